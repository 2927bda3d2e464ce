"""Triton kernels over chunks of logits: one program for each row, which it reads in blocks.

Everything is computed in the type of the logits. A tile may lie in the memory of the logits it is
made from, if narrower then with a row's entries packed to the front: a program writes entries
[j, j + BLOCK) only after it has read the logits of the same columns, and a later block is never
under an earlier tile entry. Within a block the barrier keeps the warps in that order.
"""

# Kernel arguments are pointers, strides and compile-time numbers that no Python type describes.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0913

import triton
import triton.language as tl

FORWARD_KL: tl.constexpr = tl.constexpr(0)
REVERSE_KL: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)


@triton.jit
def statistics_kernel(
    logits_ptr,
    logits_stride,
    num_columns,
    maximum_ptr,
    sum_exp_ptr,
    sum_shifted_ptr,
    LOWEST: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Online soft-max: one read of the row gives its maximum, sum and entropy sum.

    Lanes keep their own sums under the row's running maximum, so that a block costs one reduction.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    lanes = tl.arange(0, BLOCK)
    dtype = logits_ptr.dtype.element_ty
    maximum = tl.full((), LOWEST, dtype)
    sums = tl.zeros((BLOCK,), dtype)
    shifted = tl.zeros((BLOCK,), dtype)
    for start in range(0, num_columns, BLOCK):
        inside = start + lanes < num_columns
        z = tl.load(logits_ptr + start + lanes, mask=inside, other=-float("inf"))
        higher = tl.maximum(maximum, tl.max(z, 0))
        fade = tl.exp(maximum - higher)
        below = tl.where(inside, z - higher, 0.0)
        exps = tl.where(inside, tl.exp(below), 0.0)
        if WITH_ENTROPY:
            shifted = fade * (shifted + (maximum - higher) * sums) + below * exps
        sums = fade * sums + exps
        maximum = higher
    tl.store(maximum_ptr + row, maximum)
    tl.store(sum_exp_ptr + row, tl.sum(sums, 0))
    if WITH_ENTROPY:
        tl.store(sum_shifted_ptr + row, tl.sum(shifted, 0))


@triton.jit
def softmax_kernel(
    logits_ptr,
    logits_stride,
    tile_ptr,
    tile_stride,
    num_columns,
    maximum_ptr,
    factor_ptr,
    BLOCK: tl.constexpr,
):
    """Write `factor * exp(z - maximum)`."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    tile_ptr += row * tile_stride
    maximum = tl.load(maximum_ptr + row)
    factor = tl.load(factor_ptr + row)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, num_columns, BLOCK):
        inside = start + lanes < num_columns
        z = tl.load(logits_ptr + start + lanes, mask=inside, other=-float("inf"))
        entries = factor * tl.exp(z - maximum)
        tl.debug_barrier()
        tl.store(tile_ptr + start + lanes, entries.to(tile_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _terms(student, teacher, KIND: tl.constexpr, BETA: tl.constexpr):
    """Value, S g and S from log-probabilities, as in `divergence.py`."""
    probs = tl.exp(student)
    teacher_probs = tl.exp(teacher)
    if KIND == FORWARD_KL:
        value = teacher_probs * (teacher - student)
        slope = -teacher_probs
    elif KIND == REVERSE_KL:
        slope = probs * (student - teacher)
        value = slope
    else:
        top = tl.maximum(student, teacher)
        mixed = BETA * tl.exp(teacher - top) + (1.0 - BETA) * tl.exp(student - top)
        mixture = top + tl.log(mixed)
        slope = (1.0 - BETA) * probs * (student - mixture)
        value = slope + BETA * teacher_probs * (teacher - mixture)
    return value, slope, probs


@triton.jit
def divergence_values_kernel(
    student_ptr,
    student_stride,
    teacher_ptr,
    teacher_stride,
    num_columns,
    normalisers_ptr,
    values_ptr,
    KIND: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each row's value and sum of S g, over this rank's columns."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    student_maximum = tl.load(normalisers_ptr + 4 * row)
    student_log_sum = tl.load(normalisers_ptr + 4 * row + 1)
    teacher_maximum = tl.load(normalisers_ptr + 4 * row + 2)
    teacher_log_sum = tl.load(normalisers_ptr + 4 * row + 3)
    lanes = tl.arange(0, BLOCK)
    dtype = values_ptr.dtype.element_ty
    values = tl.zeros((BLOCK,), dtype)
    slopes = tl.zeros((BLOCK,), dtype)
    for start in range(0, num_columns, BLOCK):
        inside = start + lanes < num_columns
        student = tl.load(student_ptr + start + lanes, mask=inside, other=0.0)
        teacher = tl.load(teacher_ptr + start + lanes, mask=inside, other=0.0)
        student = tl.where(inside, student - student_maximum - student_log_sum, 0.0)
        teacher = tl.where(inside, teacher - teacher_maximum - teacher_log_sum, 0.0)
        value, slope, _ = _terms(student, teacher, KIND, BETA)
        values += tl.where(inside, value, 0.0)
        slopes += tl.where(inside, slope, 0.0)
    tl.store(values_ptr + 2 * row, tl.sum(values, 0))
    tl.store(values_ptr + 2 * row + 1, tl.sum(slopes, 0))


@triton.jit
def divergence_tile_kernel(
    student_ptr,
    student_stride,
    teacher_ptr,
    teacher_stride,
    num_columns,
    normalisers_ptr,
    values_ptr,
    tile_ptr,
    tile_stride,
    KIND: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write `S g - S sum(S g)`, the sum being known over all ranks."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    tile_ptr += row * tile_stride
    student_maximum = tl.load(normalisers_ptr + 4 * row)
    student_log_sum = tl.load(normalisers_ptr + 4 * row + 1)
    teacher_maximum = tl.load(normalisers_ptr + 4 * row + 2)
    teacher_log_sum = tl.load(normalisers_ptr + 4 * row + 3)
    baseline = tl.load(values_ptr + 2 * row + 1)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, num_columns, BLOCK):
        inside = start + lanes < num_columns
        student = tl.load(student_ptr + start + lanes, mask=inside, other=0.0)
        teacher = tl.load(teacher_ptr + start + lanes, mask=inside, other=0.0)
        student = tl.where(inside, student - student_maximum - student_log_sum, 0.0)
        teacher = tl.where(inside, teacher - teacher_maximum - teacher_log_sum, 0.0)
        _, slope, probs = _terms(student, teacher, KIND, BETA)
        entries = slope - probs * baseline
        tl.debug_barrier()
        tl.store(tile_ptr + start + lanes, entries.to(tile_ptr.dtype.element_ty), mask=inside)
