"""Every divergence of a micro-batch against its definition on dense float64 logits, at TP 1 and 2."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megadistill.head import VocabularyHead
from megadistill.losses import full_vocabulary, policy_gradient, policy_gradient_and, top_k
from megadistill.types import MicroBatch
from tests.head.dense import Case, assert_near, dense_logprobs
from tests.losses import rows
from tests.losses.rows import OWNER, SILENT, STUDENT, TOP_K, WEIGHTS_T
from tests.megatron.worlds import run_world

Loss = Callable[[VocabularyHead, Tensor, MicroBatch], tuple[Tensor, dict[str, Tensor]]]
TEMPERATURES = (1.0, 1.5)
COUNTING = ~SILENT & torch.tensor([bool(name) for name in OWNER])
FULL: list[dict[str, Any]] = [
    {"divergence": kind, "beta": beta, "temperature": temperature}
    for kind, beta in (
        ("forward_kl", 0.5),
        ("reverse_kl", 0.5),
        ("jsd", 0.3),
        ("jsd", 0.5),
        ("jsd", 0.0),
        ("jsd", 1.0),
    )
    for temperature in TEMPERATURES
]
SUPPORTS: list[tuple[dict[str, Any], str]] = [
    ({"direction": direction, "tail": tail, "temperature": temperature}, side)
    for direction in ("forward", "reverse")
    for tail in (False, True)
    for temperature in TEMPERATURES
    for side in ("teacher", "student")
]
TOLERANCE = 1e-9


def dense_support(
    how: dict[str, Any], side: str, size: int = TOP_K
) -> tuple[MicroBatch, tuple[Tensor, Tensor, Tensor]]:
    """The batch, and the dense divergence and masses of each row."""
    temperature = how["temperature"]
    batch = rows.with_support(
        rows.bare_rows(STUDENT), side=side, temperature=temperature, size=size
    )
    assert batch.top_ids_WK is not None
    return batch, rows.dense_top_k(batch.top_ids_WK, **how)


def weighted(values_T: Tensor, temperature: float) -> Tensor:
    return temperature**2 * (WEIGHTS_T * values_T).sum()


def gradients_of(loss: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    torch.autograd.backward(loss)
    return case.gradients()


@pytest.mark.parametrize("how", FULL)
def test_over_all_ids_with_two_teachers(how: dict[str, Any]) -> None:
    """Teachers of other widths than the student; rows of weight 0 are not even made."""
    batch = rows.with_teachers(rows.bare_rows(STUDENT))
    loss, sums = full_vocabulary(STUDENT.head(chunk_tokens=4), STUDENT.hidden_TD, batch, **how)
    found = gradients_of(loss, STUDENT)
    values_T = rows.dense_full(**how)
    expected = weighted(values_T, how["temperature"])
    assert_near(found, gradients_of(expected, STUDENT), TOLERANCE)
    assert_near(loss.detach(), expected.detach(), TOLERANCE)
    assert_near(sums["divergence/loss"], expected.detach(), TOLERANCE)
    assert_near(sums["divergence/nats_sum"], values_T.detach()[COUNTING].sum(), TOLERANCE)
    assert int(sums["divergence/rows"]) == int(COUNTING.sum()) == 9


@pytest.mark.parametrize(("how", "side"), SUPPORTS)
def test_over_the_ids_of_teacher_or_student(how: dict[str, Any], side: str) -> None:
    batch, (values_T, student_T, teacher_T) = dense_support(how, side)
    loss, sums = top_k(STUDENT.head(chunk_tokens=4), STUDENT.hidden_TD, batch, **how)
    found = gradients_of(loss, STUDENT)
    expected = weighted(values_T, how["temperature"])
    assert_near(found, gradients_of(expected, STUDENT), TOLERANCE)
    assert_near(loss.detach(), expected.detach(), TOLERANCE)
    counting = WEIGHTS_T != 0
    assert_near(sums["divergence/loss"], expected.detach(), TOLERANCE)
    assert_near(sums["divergence/nats_sum"], values_T.detach()[counting].sum(), TOLERANCE)
    assert_near(sums["divergence/student_mass_sum"], student_T[counting].sum(), TOLERANCE)
    assert_near(sums["divergence/teacher_mass_sum"], teacher_T[counting].sum(), TOLERANCE)
    assert int(sums["divergence/rows"]) == int(counting.sum())


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(
    ("direction", "kind"), [("forward", "forward_kl"), ("reverse", "reverse_kl")]
)
def test_a_support_of_all_ids_is_the_full_vocabulary(direction: str, kind: str, tail: bool) -> None:
    """T2-3: K = |V|; a tail without mass adds nothing."""
    how: dict[str, Any] = {"direction": direction, "tail": tail, "temperature": 1.5}
    batch, _ = dense_support(how, "teacher", STUDENT.vocab_size)
    loss, _ = top_k(STUDENT.head(), STUDENT.hidden_TD, batch, **how)
    found = gradients_of(loss, STUDENT)
    expected = weighted(rows.dense_full(kind, 0.5, 1.5), 1.5)
    assert_near(found, gradients_of(expected, STUDENT), 1e-8)
    assert_near(loss.detach(), expected.detach(), 1e-8)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_policy_gradient_with_a_divergence_is_the_sum_of_both(direction: Any) -> None:
    """Entropy-aware OPD: every row is sampled, some are compared as well."""
    how = {"direction": direction, "tail": False, "temperature": 1.0}
    batch, (values_T, _, _) = dense_support(how, "teacher")
    divergence = partial(top_k, direction=direction)
    loss, sums = policy_gradient_and(
        STUDENT.head(), STUDENT.hidden_TD, batch, divergence=divergence
    )
    found = gradients_of(loss, STUDENT)
    own_T = dense_logprobs(STUDENT).gather(1, STUDENT.targets_T[:, None])[:, 0]
    expected = weighted(values_T, 1.0) - (STUDENT.weights_T * own_T).sum()
    assert_near(found, gradients_of(expected, STUDENT), TOLERANCE)
    assert_near(loss.detach(), expected.detach(), TOLERANCE)
    assert int(sums["train/rows"]) == rows.NUM_ROWS
    assert int(sums["divergence/rows"]) < rows.NUM_ROWS


LOSSES: tuple[Loss, ...] = (top_k, partial(full_vocabulary, divergence="forward_kl"))


@pytest.mark.parametrize("loss", LOSSES)
def test_where_nothing_counts_the_loss_is_zero_and_still_has_a_graph(loss: Loss) -> None:
    """Every rank runs the backward pass, with its collectives, in every micro-batch."""
    batch = rows.bare_rows(STUDENT)
    total, sums = loss(STUDENT.head(), STUDENT.hidden_TD, batch)
    for gradient in gradients_of(total, STUDENT):
        assert not gradient.any()
    assert total.item() == 0.0
    assert all(value.item() == 0.0 for value in sums.values())
    sampled, _ = policy_gradient(STUDENT.head(), STUDENT.hidden_TD, batch)
    alone = gradients_of(sampled, STUDENT)
    both, _ = policy_gradient_and(STUDENT.head(), STUDENT.hidden_TD, batch, divergence=loss)
    for one, other in zip(alone, gradients_of(both, STUDENT), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradcheck(direction: Any, tail: bool) -> None:
    how = {"direction": direction, "tail": tail, "temperature": 1.5}
    batch, _ = dense_support(how, "student")

    def loss(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        head = VocabularyHead(weight_VD=weight_VD, vocab_size=STUDENT.vocab_size, chunk_tokens=2)
        return top_k(head, hidden_TD, batch, direction=direction, tail=tail, temperature=1.5)[0]

    assert torch.autograd.gradcheck(loss, (STUDENT.hidden_TD, STUDENT.weight_VD))


def shard_of(case: Case, rows_per_rank: int) -> Tensor:
    """This rank's rows of a case's output weight; past the vocabulary loud padding."""
    whole_VD = case.weight_VD.detach()[: case.vocab_size]
    padding = whole_VD.new_full((2 * rows_per_rank - len(whole_VD), whole_VD.shape[1]), 50.0)
    start = dist.get_rank() * rows_per_rank
    return torch.cat((whole_VD, padding))[start : start + rows_per_rank].clone()


def compare_two_ranks_with_dense() -> None:
    """Student and teachers are cut in different places; each rank has a part of each gradient."""
    weight_VD = shard_of(STUDENT, 20).requires_grad_()
    hidden_TD = STUDENT.hidden_TD.detach().clone().requires_grad_()
    head = VocabularyHead(
        weight_VD=weight_VD,
        vocab_size=STUDENT.vocab_size,
        group=dist.group.WORLD,
        chunk_tokens=4,
        reduce_hidden_gradient=True,
    )
    weights = {
        name: shard_of(case, rows_per_rank)
        for (name, case), rows_per_rank in zip(rows.TEACHERS.items(), (19, 24), strict=True)
    }
    taught = rows.with_teachers(rows.bare_rows(STUDENT), weights)
    pairs: list[tuple[Loss, MicroBatch, Tensor, dict[str, Any]]] = [
        (partial(full_vocabulary, **how), taught, rows.dense_full(**how), how) for how in FULL
    ]
    for how, side in SUPPORTS:
        batch, (values_T, _, _) = dense_support(how, side)
        pairs.append((partial(top_k, **how), batch, values_T, how))
    for loss, batch, values_T, how in pairs:
        total, _ = loss(head, hidden_TD, batch)
        torch.autograd.backward(total)
        expected = weighted(values_T, how["temperature"])
        expected_TD, expected_VD = gradients_of(expected, STUDENT)
        assert hidden_TD.grad is not None
        assert weight_VD.grad is not None
        assert_near(total.detach(), expected.detach(), TOLERANCE)
        assert_near(hidden_TD.grad, expected_TD, TOLERANCE)
        own_VD = expected_VD[: STUDENT.vocab_size][dist.get_rank() * 20 :][:20]
        assert_near(weight_VD.grad[: len(own_VD)], own_VD, TOLERANCE)
        assert not weight_VD.grad[len(own_VD) :].any()
        hidden_TD.grad = weight_VD.grad = None


@pytest.mark.multi
def test_two_tensor_parallel_ranks_equal_the_dense_definition() -> None:
    run_world(compare_two_ranks_with_dense, 2)
