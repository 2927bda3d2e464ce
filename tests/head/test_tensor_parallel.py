"""Two ranks over gloo give what one rank gives: values and gradients."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from megadistill.head import (
    VocabularyHead,
    divergences,
    forward_kl,
    jsd,
    logprobs,
    reverse_kl,
    score,
    weighted_nll,
)
from tests.head.dense import Case, assert_near, make_case

NUM_RANKS = 2
TOLERANCE = 1e-6


def padded(weight_VD: Tensor, num_rows: int) -> Tensor:
    """Padding rows with loud values: they must not be seen."""
    rows = weight_VD.new_full((num_rows - weight_VD.shape[0], weight_VD.shape[1]), 50.0)
    return torch.cat((weight_VD.detach(), rows))


class Shard:
    """One rank's view of a case, cut into shards of `rows_per_rank`."""

    def __init__(self, case: Case, rows_per_rank: int) -> None:
        rank = dist.get_rank()
        whole_VD = padded(case.weight_VD[: case.vocab_size], rows_per_rank * NUM_RANKS)
        self.rows = slice(rank * rows_per_rank, (rank + 1) * rows_per_rank)
        self.weight_VD = whole_VD[self.rows].clone().requires_grad_()
        self.hidden_TD = case.hidden_TD.detach().clone().requires_grad_()
        self.head = VocabularyHead(
            weight_VD=self.weight_VD,
            vocab_size=case.vocab_size,
            group=dist.group.WORLD,
            chunk_tokens=5,
            backend=case.backend,
            reduce_hidden_gradient=True,
        )

    def compare_gradients(self, case: Case) -> None:
        """Take both sides' gradients; shards past the vocabulary must have received none."""
        hidden_TD, weight_VD = case.gradients()
        expected_VD = weight_VD[: case.vocab_size][self.rows]
        assert self.hidden_TD.grad is not None
        assert self.weight_VD.grad is not None
        assert_near(self.hidden_TD.grad, hidden_TD, TOLERANCE)
        found_VD = self.weight_VD.grad
        assert_near(found_VD[: len(expected_VD)], expected_VD, TOLERANCE)
        assert not found_VD[len(expected_VD) :].any()
        self.hidden_TD.grad = self.weight_VD.grad = None


def compare_scores(case: Case, shard: Shard) -> None:
    ids_TK = torch.cat((case.targets_T[:, None], case.targets_T.flip(0)[:, None]), 1)
    for top_k in (1, case.vocab_size):
        one, two = (
            score(head, case.hidden_TD, ids_TK, top_k=top_k, with_entropy=True, temperature=1.3)
            for head in (case.head(), shard.head)
        )
        assert_near(two.logprobs_TK, one.logprobs_TK, TOLERANCE)
        assert_near(two.entropy_T, one.entropy_T, TOLERANCE)
        assert_near(two.top_logprobs_TK, one.top_logprobs_TK, TOLERANCE)
        assert torch.equal(two.top_ids_TK, one.top_ids_TK)  # type: ignore[arg-type]


def compare_nll(case: Case, shard: Shard) -> None:
    losses = []
    for head, hidden_TD in ((case.head(), case.hidden_TD), (shard.head, shard.hidden_TD)):
        loss, statistics = weighted_nll(
            head, hidden_TD, case.targets_T, case.weights_T.float(), temperature=1.3
        )
        torch.autograd.backward(loss)
        losses.append((loss.detach(), statistics.logprobs_T, statistics.entropy_T))
    assert_near(losses[1], losses[0], TOLERANCE)
    shard.compare_gradients(case)


def compare_logprobs(case: Case, shard: Shard) -> None:
    ids_TK = torch.cat((case.targets_T[:, None], case.targets_T.flip(0)[:, None]), 1)
    values = []
    for head, hidden_TD in ((case.head(), case.hidden_TD), (shard.head, shard.hidden_TD)):
        logprobs_TK = logprobs(head, hidden_TD, ids_TK, temperature=1.3)
        torch.autograd.backward((logprobs_TK * case.weights_T[:, None].float()).sum())
        values.append(logprobs_TK.detach())
    assert_near(values[1], values[0], TOLERANCE)
    shard.compare_gradients(case)


def compare_divergences(case: Case, shard: Shard, teacher: Case, teacher_shard: Shard) -> None:
    one_teacher = teacher.head(), teacher.hidden_TD
    two_teacher = teacher_shard.head, teacher.hidden_TD
    one = divergences(case.head(), case.hidden_TD, *one_teacher)
    two = divergences(shard.head, shard.hidden_TD, *two_teacher)
    assert_near(two.forward_kl_T, one.forward_kl_T, TOLERANCE)
    assert_near(two.reverse_kl_T, one.reverse_kl_T, TOLERANCE)
    weights_T = case.weights_T.float()
    for function in (forward_kl, reverse_kl, jsd):
        losses = []
        for head, hidden_TD, other in (
            (case.head(), case.hidden_TD, one_teacher),
            (shard.head, shard.hidden_TD, two_teacher),
        ):
            loss, values_T = function(head, hidden_TD, *other, weights_T)
            torch.autograd.backward(loss)
            losses.append((loss.detach(), values_T))
        assert_near(losses[1], losses[0], TOLERANCE)
        shard.compare_gradients(case)


def compare_one_rank_with_two(rank: int, meeting: str, backend: str) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=NUM_RANKS
    )
    make = partial(
        make_case,
        vocab_size=37,
        num_padding=0,
        scale=0.3,
        dtype=torch.float32,
        backend=backend,
    )
    case, teacher = make(), make(hidden_size=5, seed=1)
    # 37 ids in shards of 19 and 18, with some padding, and with nothing but padding on rank 1.
    for rows_per_rank, teacher_rows_per_rank in ((19, 19), (20, 27), (40, 37)):
        shard = Shard(case, rows_per_rank)
        compare_scores(case, shard)
        compare_nll(case, shard)
        compare_logprobs(case, shard)
        compare_divergences(case, shard, teacher, Shard(teacher, teacher_rows_per_rank))
    dist.destroy_process_group()


@pytest.mark.multi
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_ranks_equal_one(tmp_path: Path, backend: str) -> None:
    start_processes(  # type: ignore[no-untyped-call]
        compare_one_rank_with_two, args=(str(tmp_path / "meeting"), backend), nprocs=NUM_RANKS
    )
