"""One number for a set of named tensors, computed alike by the trainer and by every engine."""

import zlib
from collections.abc import Iterable

import numpy as np
import torch

FOLD_WORDS = 1021
"""64-bit words in a row. Rows are summed before the CRC, which alone is six times slower; a prime,
so that exchanged rows of a weight matrix do not add up to the same sum."""

MASK = (1 << 64) - 1


def tensor_checksum(name: str, tensor: torch.Tensor) -> int:
    """64 bits of a tensor's name, dtype, shape and bytes.

    The bytes are read as rows of little-endian words, summed modulo 2^64, and the sum goes
    through CRC-32. It tells stale, torn and mixed-up weights apart; it is no defence against
    somebody who forges them.
    """
    header = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode()
    plain = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    whole = plain.size - plain.size % (8 * FOLD_WORDS)
    rows = plain[:whole].view("<u8").reshape(-1, FOLD_WORDS)
    folded = np.add.reduce(rows, axis=0, dtype=np.uint64)
    content = zlib.crc32(plain[whole:].tobytes(), zlib.crc32(folded.tobytes()))
    return zlib.crc32(header, content) << 32 | content


class Checksum:
    """The order-independent sum of `tensor_checksum` over everything added."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._sum = (self._sum + tensor_checksum(name, tensor)) & MASK

    def hexdigest(self) -> str:
        return f"{self._sum:016x}"


def checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Checksum of all (name, tensor) pairs, in any order."""
    total = Checksum()
    for name, tensor in tensors:
        total.add(name, tensor)
    return total.hexdigest()
