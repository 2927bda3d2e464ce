"""Sampling seeds that are the same in every process, so that a repeated step repeats its text."""

import hashlib

SEEDS = 1 << 31


def seed_for(run_seed: int, step: int, prompt_id: str, sample: int = 0) -> int:
    """Seed in 0 .. 2^31 - 1 of the `sample`-th response to one prompt at one step."""
    # Python's own hash() differs between processes.
    key = f"{run_seed}/{step}/{sample}/{prompt_id}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % SEEDS
