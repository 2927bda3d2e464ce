"""Weight merging: several models of one shape become one without training.

`linear` is the weighted mean of the weights. `ties` is TIES (arXiv:2306.01708): of each model's
change of a base the entries of the largest magnitude are kept, at every entry the sign of the larger
mass is elected, and the mean of the changes that agree with it is added to the base, scaled.

Tensors are read, merged and written one at a time: memory stays at a few. Shape legend: M models, P entries.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megadistill.convert.hf_files import SafetensorsReader, writing_model
from megadistill.resolve import read_settings

COMPUTATION = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")
"""Settings of `config.json` that tensors of equal shapes may be meant for differently."""
BLOCK = 1 << 24
"""Entries that are merged at once, in wider types than they are kept in."""
HALF_BITS = 16
"""Of an fp32 magnitude, whose bits are ordered like itself: half of them is searched in a pass."""


def merge_linear(
    sources: Sequence[str | Path], target: str | Path, weights: Sequence[float] | None = None
) -> Path:
    """Write the mean of `sources`, weighted by `weights` over their sum, to the new directory.

    Configuration, tokenizer and types are the first one's. Raises `ValueError` for models that
    differ in a tensor's name or shape, or weights that are none.
    """
    readers = _opened(sources)
    weights = [1.0] * len(readers) if not weights else list(weights)
    if len(weights) != len(readers):
        raise ValueError(f"weight: found {len(weights)} of them, expected one of each model")
    if not all(weight > 0 for weight in weights) or not math.isfinite(sum(weights)):
        raise ValueError(f"weight: found {weights}, expected positive numbers with a finite sum")
    shares_M = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
    return _write(readers, target, lambda parts_MP: (shares_M[:, None] * parts_MP.double()).sum(0))


def merge_ties(
    sources: Sequence[str | Path],
    base: str | Path,
    target: str | Path,
    *,
    keep: float = 0.2,
    scale: float = 1.0,
) -> Path:
    """Write TIES of `sources` against `base` to the new directory; the rest is `base`'s.

    `keep` is the share of each model's changes that stays, over all of its tensors; `scale` is
    lambda. Reads every model three times. Raises `ValueError` as `merge_linear` does.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: found {keep}, expected a share above 0, at most 1")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: found {scale}, expected a positive number")
    origin, *readers = _opened([base, *sources])
    thresholds_M = torch.tensor([_threshold(reader, origin, keep) for reader in readers])

    def merged(parts_MP: Tensor) -> Tensor:
        changes_MP = parts_MP[1:] - parts_MP[0]
        changes_MP[changes_MP.abs() < thresholds_M[:, None]] = 0.0
        return parts_MP[0] + scale * elected_mean(changes_MP)

    return _write([origin, *readers], target, merged)


def elected_mean(changes_MP: Tensor) -> Tensor:
    """Mean of the changes that have the sign of the larger mass; 0 where both weigh the same."""
    sign_P = changes_MP.double().sum(0).sign()
    agreeing_MP = (changes_MP.sign() == sign_P) & (sign_P != 0)
    total_P = (changes_MP.double() * agreeing_MP).sum(0)
    return (total_P / agreeing_MP.sum(0).clamp(min=1)).float()


def _opened(models: Sequence[str | Path]) -> list[SafetensorsReader]:
    """Readers of models that agree in the name and shape of every tensor."""
    if len(models) < 2:
        raise ValueError(f"merge: found {len(models)} model, expected at least two")
    first, *others = readers = [SafetensorsReader(model) for model in models]
    settings = [_computation(reader.directory) for reader in readers]
    for other, its in zip(others, settings[1:], strict=True):
        for key in COMPUTATION:
            if None not in (its[key], settings[0][key]) and its[key] != settings[0][key]:
                raise ValueError(
                    f"{other.directory}/config.json: {key}: found {its[key]!r}, expected "
                    f"{settings[0][key]!r} as in {first.directory}; only models that compute alike merge"
                )
        for name in dict.fromkeys((*first.names, *other.names)):
            shapes = [
                reader.shape(name) if name in reader.names else None for reader in (first, other)
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{name}: found {shapes[1] if shapes[1] is not None else 'no such tensor'} in {other.directory}, expected "
                    f"{shapes[0] if shapes[0] is not None else 'none'} as in {first.directory}; only models of one shape merge"
                )
    return readers


def _computation(directory: Path) -> dict[str, object]:
    """What `config.json` says of `COMPUTATION`; None where it says nothing. Raises `ValueError`."""
    found = read_settings(directory / "config.json")
    if not found:
        raise ValueError(f"{directory}/config.json: no such file, expected a model's settings")
    return {key: found.get(key) for key in COMPUTATION}


def _write(
    readers: Sequence[SafetensorsReader],
    target: str | Path,
    merged: Callable[[Tensor], Tensor],
) -> Path:
    """A new model of the first one's kind, from `merged` of `[M, P]` blocks of all models."""
    with writing_model(target) as writer:
        for name in readers[0].names:
            result = readers[0].read(name).clone()
            blocks = torch.split(result.view(-1), BLOCK)
            for block_P, parts_MP in zip(blocks, _blocks(readers, name), strict=True):
                block_P.copy_(merged(parts_MP))
                if not block_P.float().isfinite().all():
                    raise ValueError(
                        f"{name}: found NaN or infinity in the merged values, expected "
                        f"numbers that {result.dtype} holds"
                    )
            writer.write(name, result)
        writer.copy_metadata(readers[0].directory)
    return Path(target).absolute()


def _blocks(readers: Sequence[SafetensorsReader], name: str) -> Iterator[Tensor]:
    """fp32 `[M, P]` blocks of one tensor of every model."""
    parts = [torch.split(reader.read(name).flatten(), BLOCK) for reader in readers]
    for block in zip(*parts, strict=True):
        parts_MP = torch.stack([part_P.float() for part_P in block])
        for reader, finite in zip(readers, parts_MP.isfinite().all(dim=1), strict=True):
            if not finite:
                raise ValueError(
                    f"{name}: found NaN or infinity in {reader.directory}, expected numbers"
                )
        yield parts_MP


def _threshold(reader: SafetensorsReader, base: SafetensorsReader, keep: float) -> float:
    """The smallest magnitude among the share `keep` of a model's changes, exactly.

    No sort of all changes fits in memory, so two passes count them: by the upper half of their
    bits, then by the lower half of those that share the upper half of the one that is sought.
    """
    upper = torch.zeros(1 << HALF_BITS, dtype=torch.int64)
    for bits_P in _magnitude_bits(reader, base):
        upper += torch.bincount(bits_P >> HALF_BITS, minlength=len(upper))
    above, top = _descend(upper, max(1, round(keep * int(upper.sum()))))
    lower = torch.zeros_like(upper)
    for bits_P in _magnitude_bits(reader, base):
        inside_P = bits_P[bits_P >> HALF_BITS == top]
        lower += torch.bincount(inside_P & ((1 << HALF_BITS) - 1), minlength=len(lower))
    _, bottom = _descend(lower, above)
    return float(torch.tensor(top << HALF_BITS | bottom, dtype=torch.int32).view(torch.float32))


def _descend(counts: Tensor, rank: int) -> tuple[int, int]:
    """From the top the bin with the entry of this rank (from 1), and its rank inside the bin."""
    reached = counts.flip(0).cumsum(0)
    place = int((reached >= rank).nonzero()[0])
    bin_ = len(counts) - 1 - place
    return rank - int(reached[place] - counts[bin_]), bin_


def _magnitude_bits(reader: SafetensorsReader, base: SafetensorsReader) -> Iterator[Tensor]:
    for name in reader.names:
        for changed_P, start_P in _blocks([reader, base], name):
            yield (changed_P - start_P).abs_().view(torch.int32).long()
