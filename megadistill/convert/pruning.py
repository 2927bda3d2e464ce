"""FAPM: after fine-tuning, undo the changes that forgetting is most likely due to (arXiv:2509.08255).

Of each weight matrix the changes D = W_tuned - W_base are ranked by

    S = |D| - mean|W_base| * |D| / |W_base|

so that a change counts the less, the smaller the weight that it changed; those of the highest rank are
kept, the others undone. The formula and the usual share, a tenth, are from summaries of the paper, not
from its text or code.
"""

from pathlib import Path

import torch
from torch import Tensor

from megadistill.convert.hf_files import SafetensorsReader, writing_model

TINY = 1e-12
"""Stands for a weight of exactly zero, whose change has the lowest rank."""


def prune_change(tuned: str | Path, base: str | Path, target: str | Path, keep: float) -> Path:
    """Write `tuned` to the new directory `target` with the share `keep` of its changes of `base`.

    Vectors (norms, biases) stay as they were tuned. Raises `ValueError` for models that differ in
    their tensors, or a share that is none.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: found {keep}, expected a share above 0, at most 1")
    source, origin = SafetensorsReader(tuned), SafetensorsReader(base)
    if differing := sorted(set(source.names) ^ set(origin.names)):
        raise ValueError(
            f"{tuned} and {base}: {len(differing)} tensors are in one only, e.g. {differing[0]}"
        )
    with writing_model(target) as writer:
        for name in source.names:
            found, original = source.read(name), origin.read(name)
            if found.shape != original.shape:
                raise ValueError(
                    f"{name}: found {tuple(found.shape)} in {tuned}, {tuple(original.shape)} in {base}"
                )
            for tensor, model in ((found, tuned), (original, base)):
                if not tensor.float().isfinite().all():
                    raise ValueError(f"{name}: found NaN or infinity in {model}, expected numbers")
            writer.write(name, pruned(found, original, keep) if found.dim() > 1 else found)
        writer.copy_metadata(source.directory)
    return Path(target).absolute()


def pruned(tuned: Tensor, base: Tensor, keep: float) -> Tensor:
    """`base` with the changes of the highest rank, as many as the share `keep`, in tuned's dtype."""
    weights = base.float()
    change = (tuned.float() - weights).abs_()
    size = weights.abs().clamp_min(TINY)
    ranks = change - size.mean() * change / size
    count = max(1, round(keep * change.numel()))
    kept = torch.zeros(change.numel(), dtype=torch.bool)
    kept[ranks.flatten().topk(count).indices] = True
    return torch.where(kept.view_as(tuned), tuned, base.to(tuned.dtype))
