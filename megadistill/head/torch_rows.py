"""The torch backend: every pass over a block of rows that stays in the CPU's cache.

Ranks exchange their few numbers block by block, so that a block is read from memory once.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megadistill.head.backend import Divergence
from megadistill.head.projection import row_blocks
from megadistill.head.rows import RowStatistics, combine, join, sum_ranks


def make_tile(logits_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """The logits' own memory, or a copy as narrow as the head."""
    return logits_CV if dtype == logits_CV.dtype else torch.empty_like(logits_CV, dtype=dtype)


def statistics(logits_CV: Tensor, *, with_entropy: bool) -> RowStatistics:
    """This shard's statistics; exponentials exist for one block."""
    scratch = _Scratch(logits_CV)
    parts = []
    for block in row_blocks(logits_CV):
        x, exps = scratch.blocks(block)
        parts.append(_exponentiate(logits_CV[block], x, exps, with_entropy=with_entropy))
    return join(parts)


def soften(
    logits_CV: Tensor, tile_CV: Tensor, group: ProcessGroup | None
) -> tuple[RowStatistics, Tensor]:
    """Leave exp(z - maximum) in the tile.

    On one rank the factor 1 / sum stays outside, which saves a pass. On several ranks a shard may
    hold almost none of a row's mass and its factor may underflow: then it goes into the tile.
    """
    scratch = _Scratch(logits_CV)
    totals = []
    for block in row_blocks(logits_CV):
        x, _ = scratch.blocks(block)
        exps = logits_CV[block]
        local = _exponentiate(exps, x, exps, with_entropy=True)
        total = combine(local, group)
        if group is not None:
            exps *= ((local.maximum_C - total.maximum_C).exp() / total.sum_exp_C)[:, None]
        if tile_CV.dtype != logits_CV.dtype:
            tile_CV[block] = exps
        totals.append(total)
    total = join(totals)
    factor_C = torch.ones_like(total.sum_exp_C)
    return total, factor_C if group is not None else total.sum_exp_C.reciprocal()


def softmax_tile(logits_CV: Tensor, tile_CV: Tensor, total: RowStatistics, scale_C: Tensor) -> None:
    """Soft-max from known statistics."""
    factor_C1 = (scale_C / total.sum_exp_C)[:, None]
    for block in row_blocks(logits_CV):
        exps = logits_CV[block].sub_(total.maximum_C[block, None]).exp_()
        exps *= factor_C1[block]
        if tile_CV.dtype != logits_CV.dtype:
            tile_CV[block] = exps


def divergence(
    kind: Divergence,
    logits: tuple[Tensor, Tensor],
    tile_CV: Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:
    """Values of all rows, and `slope - probability * sum of slopes` in the tile."""
    student_CV, teacher_CV = logits
    values = []
    for block in row_blocks(student_CV):
        student_BV = _log_softmax(student_CV[block], group)
        teacher_BV = _log_softmax(teacher_CV[block], group)
        probs_BV = student_BV.exp()
        value_B, slope_BV = _TERMS[kind.name](student_BV, teacher_BV, probs_BV, kind.beta)
        value_B, baseline_B = sum_ranks(torch.stack((value_B, slope_BV.sum(-1))), group)
        values.append(value_B)
        if tile_CV is not None:
            tile_BV = tile_CV[block]
            torch.addcmul(slope_BV, probs_BV, baseline_B[:, None], value=-1.0, out=tile_BV)
    return torch.cat(values)


def _forward_terms(
    student_BV: Tensor, teacher_BV: Tensor, _: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    probs_BV = teacher_BV.exp()
    return (teacher_BV.sub_(student_BV).mul_(probs_BV)).sum(-1), probs_BV.neg_()


def _reverse_terms(
    student_BV: Tensor, teacher_BV: Tensor, probs_BV: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    slope_BV = student_BV.sub_(teacher_BV).mul_(probs_BV)
    return slope_BV.sum(-1), slope_BV


def _jsd_terms(
    student_BV: Tensor, teacher_BV: Tensor, probs_BV: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    teacher_probs_BV = teacher_BV.exp()
    mixture_BV = torch.lerp(probs_BV, teacher_probs_BV, beta)
    # Where both probabilities underflow their terms are zero, if only the logarithm is finite.
    mixture_BV.clamp_(min=torch.finfo(mixture_BV.dtype).tiny).log_()
    slope_BV = student_BV.sub_(mixture_BV).mul_(probs_BV).mul_(1.0 - beta)
    teacher_kl_B = teacher_BV.sub_(mixture_BV).mul_(teacher_probs_BV).sum(-1)
    return slope_BV.sum(-1) + beta * teacher_kl_B, slope_BV


_Terms = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
_TERMS: dict[str, _Terms] = {
    "forward_kl": _forward_terms,
    "reverse_kl": _reverse_terms,
    "jsd": _jsd_terms,
}
"""(log S, log T, S, beta) to this rank's share of the value, and S g; log S and log T are lost."""


def _log_softmax(logits_BV: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is None:
        return torch.log_softmax(logits_BV, -1)
    total = combine(statistics(logits_BV, with_entropy=False), group)
    return total.logprobs(logits_BV)


class _Scratch:
    """Two blocks of working memory, used again and again."""

    def __init__(self, logits_CV: Tensor) -> None:
        size = row_blocks(logits_CV)[0].stop
        self._pair = logits_CV.new_empty(2, min(size, logits_CV.shape[0]), logits_CV.shape[1])

    def blocks(self, block: slice) -> tuple[Tensor, Tensor]:
        """Both, as long as a block of rows."""
        x, exps = self._pair[:, : block.stop - block.start]
        return x, exps


def _exponentiate(
    logits_BV: Tensor, x_BV: Tensor, exps_BV: Tensor, *, with_entropy: bool
) -> RowStatistics:
    """Write exp(z - maximum) to `exps`, which may be the logits, and return the statistics."""
    if logits_BV.shape[1] == 0:
        # Nothing but padding here. A finite maximum far below any logit keeps the combination of
        # ranks free of inf - inf.
        zeros_B = logits_BV.new_zeros(logits_BV.shape[0])
        lowest = torch.finfo(logits_BV.dtype).min / 4
        return RowStatistics(maximum_C=zeros_B + lowest, sum_exp_C=zeros_B, sum_shifted_C=zeros_B)
    maximum_B = logits_BV.amax(-1)
    torch.sub(logits_BV, maximum_B[:, None], out=x_BV)
    torch.exp(x_BV, out=exps_BV)
    return RowStatistics(
        maximum_C=maximum_B,
        sum_exp_C=exps_BV.sum(-1),
        sum_shifted_C=x_BV.mul_(exps_BV).sum(-1) if with_entropy else None,
    )
