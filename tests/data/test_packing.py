from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megadistill.data.packing import (
    PackingRules,
    assign,
    empty_micro_batch,
    micro_batches,
    pack,
)
from megadistill.types import MicroBatch, Sample, TokenSpan, TopK

Lengths = st.lists(st.integers(1, 60), max_size=30)


def span(num_tokens: int, num_scored: int) -> TokenSpan:
    """Ids count from 100 x length, so that every id of a test is distinct."""
    start = 100 * num_tokens
    ids = np.arange(start, start + num_tokens, dtype=np.int32)
    return TokenSpan(token_ids_N=ids, num_scored=num_scored)


def sample(num_tokens: int, num_scored: int, weights: Sequence[float] | None = None) -> Sample:
    """The span with these weights, or zeros."""
    made = span(num_tokens, num_scored)
    values = np.zeros(max(num_scored, 0)) if weights is None else np.asarray(weights)
    return Sample(span=made, weights_R=values.astype(np.float32))


def taught(num_tokens: int, num_scored: int, teacher: str, size: int, silent: int) -> Sample:
    """As `sample`; a teacher's hidden states and the ids of a support say whose row they are.

    Every `silent`-th divergence weight is 0.
    """
    made = sample(num_tokens, num_scored)
    targets_R = made.span.token_ids_N[-num_scored:]
    weights_R = np.where(np.arange(num_scored) % silent, targets_R, 0).astype(np.float32)
    support = TopK(
        ids_RK=targets_R[:, None] + np.arange(2, dtype=np.int32),
        logprobs_RK=np.repeat(targets_R[:, None], 2, axis=1).astype(np.float32),
    )
    hidden_RD = torch.from_numpy(targets_R).to(torch.bfloat16)[:, None].repeat(1, size)
    return replace(
        made,
        divergence_weights_R=weights_R,
        top_k=support,
        teacher=teacher,
        hidden_RD=hidden_RD,
    )


def read_rows(batch: MicroBatch) -> list[tuple[int, int]]:
    """(input id at the row, target id) of every row."""
    inputs = batch.token_ids_T[batch.rows_W].tolist()
    return list(zip(inputs, batch.targets_W.tolist(), strict=True))


@given(Lengths, st.integers(1, 5))
def test_assignment_gives_every_sequence_once_and_balances(lengths: list[int], ranks: int) -> None:
    shares = assign(lengths, ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(Lengths, st.integers(1, 80))
def test_packing_keeps_within_the_limit_unless_one_sequence_is_longer(
    lengths: list[int], max_tokens: int
) -> None:
    bins = pack(lengths, max_tokens)
    assert sorted(index for own in bins for index in own) == list(range(len(lengths)))
    for own in bins:
        assert sum(lengths[index] for index in own) <= max_tokens or len(own) == 1


def test_micro_batch_holds_inputs_and_the_rows_that_predict_scored_tokens() -> None:
    samples = [sample(4, 2), sample(3, 1)]
    (batch,) = micro_batches(samples, [0, 1], PackingRules(max_tokens=16))
    assert batch.token_ids_T.tolist() == [400, 401, 402, 300, 301]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    assert read_rows(batch) == [(401, 402), (402, 403), (301, 302)]
    assert batch.weights_W.tolist() == [0.0, 0.0, 0.0]
    assert (batch.sample_ids, batch.rows_per_sample) == ((0, 1), (2, 1))
    assert batch.divergence_weights_W is batch.top_ids_WK is None
    assert batch.teachers == {}


def test_weights_follow_their_rows() -> None:
    samples = [sample(9, 3, [1, 2, 3]), sample(3, 1, [4]), sample(5, 4, [5, 6, 7, 8])]
    batches = micro_batches(samples, [0, 1, 2], PackingRules(max_tokens=8))
    found = {
        target: weight
        for batch in batches
        for target, weight in zip(batch.targets_W.tolist(), batch.weights_W.tolist(), strict=True)
    }
    assert found == {906: 1, 907: 2, 908: 3, 302: 4, 501: 5, 502: 6, 503: 7, 504: 8}


def test_padding_is_one_more_sequence_without_rows() -> None:
    (batch,) = micro_batches([sample(4, 3)], [0], PackingRules(max_tokens=16, multiple=8))
    assert len(batch.token_ids_T) == 8
    assert batch.cu_seqlens.tolist() == [0, 3, 8]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert read_rows(batch) == [(400, 401), (401, 402), (402, 403)]


def test_spans_without_scored_tokens_are_left_out() -> None:
    assert micro_batches([sample(4, 0)], [0], PackingRules(max_tokens=16)) == []


@pytest.mark.parametrize("num_scored", [4, 5, -1])
def test_a_scored_first_token_is_refused(num_scored: int) -> None:
    with pytest.raises(ValueError, match="num_scored"):
        micro_batches([sample(4, num_scored)], [0], PackingRules(max_tokens=16))


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("multiple", [1, 4])
def test_context_parallel_ranks_share_tokens_and_rows(cp: int, multiple: int) -> None:
    samples = [sample(11, 7, range(7)), sample(30, 29, range(29))]
    by_rank = [
        micro_batches(
            samples, [0, 1], PackingRules(max_tokens=64, multiple=multiple, cp=cp, cp_rank=rank)
        )
        for rank in range(cp)
    ]
    for own in zip(*by_rank, strict=True):
        index = own[0].sample_ids[0]
        whole = samples[index].span
        lengths = {len(batch.token_ids_T) for batch in own}
        assert len(lengths) == 1
        assert lengths.pop() % multiple == 0
        positions = torch.cat([batch.position_ids_T for batch in own])
        ids = torch.cat([batch.token_ids_T for batch in own])[positions.argsort()]
        assert positions.sort().values.tolist() == list(range(len(positions)))
        inputs = whole.token_ids_N[:-1].tolist()
        assert ids.tolist()[: len(inputs)] == inputs
        rows = sorted(row for batch in own for row in read_rows(batch))
        first = len(whole.token_ids_N) - whole.num_scored
        tokens = whole.token_ids_N.tolist()
        assert rows == [(tokens[i - 1], tokens[i]) for i in range(first, len(tokens))]
        assert sum(sum(batch.rows_per_sample) for batch in own) == whole.num_scored
        weighted = {
            target: weight
            for batch in own
            for target, weight in zip(
                batch.targets_W.tolist(), batch.weights_W.tolist(), strict=True
            )
        }
        assert [weighted[token] for token in tokens[first:]] == samples[index].weights_R.tolist()


def test_zigzag_gives_a_rank_one_early_and_one_late_chunk() -> None:
    rules = PackingRules(max_tokens=64, cp=2, cp_rank=0)
    (batch,) = micro_batches([sample(9, 8)], [0], rules)
    assert batch.position_ids_T.tolist() == [0, 1, 6, 7]


@pytest.mark.parametrize(
    "rules",
    [PackingRules(max_tokens=8), PackingRules(max_tokens=8, multiple=4, cp=2, cp_rank=1)],
)
def test_the_micro_batch_of_an_idle_rank_has_no_rows(rules: PackingRules) -> None:
    batch = empty_micro_batch(rules)
    assert len(batch.rows_W) == len(batch.targets_W) == len(batch.weights_W) == 0
    assert len(batch.token_ids_T) % rules.multiple == 0
    assert len(batch.token_ids_T) > 0
    assert (batch.sample_ids, batch.rows_per_sample) == ((), ())


def check_teachers(batch: MicroBatch) -> dict[str, list[int]]:
    """Each teacher's targets, after a look at whether all it says is about its own rows."""
    found = {}
    for name, teacher in batch.teachers.items():
        targets_S = batch.targets_W[teacher.rows_S]
        expected = targets_S.to(torch.bfloat16)[:, None].expand_as(teacher.hidden_SD)
        assert torch.equal(teacher.hidden_SD, expected)
        found[name] = targets_S.tolist()
    assert batch.divergence_weights_W is not None
    said_W = batch.divergence_weights_W != 0
    assert torch.equal(batch.divergence_weights_W[said_W], batch.targets_W[said_W].float())
    assert batch.top_ids_WK is not None
    assert batch.top_logprobs_WK is not None
    with_support_W = batch.top_ids_WK[:, 0] >= 0
    assert torch.equal(batch.top_ids_WK[with_support_W, 0], batch.targets_W[with_support_W])
    assert torch.equal(batch.top_logprobs_WK[:, 1], with_support_W * batch.targets_W.float())
    return found


def test_two_teachers_share_a_micro_batch() -> None:
    """Rows of weight 0 are left out of what a teacher ships."""
    samples = [
        taught(4, 3, "b", 2, 2),
        sample(3, 1),
        taught(6, 4, "a", 5, 3),
        taught(5, 2, "b", 2, 9),
    ]
    (batch,) = micro_batches(samples, [0, 1, 2, 3], PackingRules(max_tokens=64))
    assert check_teachers(batch) == {"b": [402, 504], "a": [603, 604]}
    assert [len(teacher.hidden_SD[0]) for teacher in batch.teachers.values()] == [2, 5]


@pytest.mark.parametrize("cp", [2, 3])
def test_context_parallel_ranks_share_a_teachers_rows(cp: int) -> None:
    samples = [taught(11, 7, "a", 2, 3), taught(30, 29, "b", 5, 2)]
    found: dict[str, list[int]] = {"a": [], "b": []}
    for rank in range(cp):
        for batch in micro_batches(
            samples, [0, 1], PackingRules(max_tokens=64, cp=cp, cp_rank=rank)
        ):
            for name, targets in check_teachers(batch).items():
                found[name] += targets
    for one in samples:
        assert one.divergence_weights_R is not None
        weights = one.divergence_weights_R[one.divergence_weights_R != 0]
        assert sorted(found[str(one.teacher)]) == weights.tolist()
