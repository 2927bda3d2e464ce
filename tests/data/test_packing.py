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
from megadistill.types import MicroBatch, TokenSpan

Lengths = st.lists(st.integers(1, 60), max_size=30)


def span(num_tokens: int, num_scored: int) -> TokenSpan:
    """Ids count from 100 x length, so that every id of a test is distinct."""
    start = 100 * num_tokens
    ids = np.arange(start, start + num_tokens, dtype=np.int32)
    return TokenSpan(token_ids_N=ids, num_scored=num_scored)


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
    spans = [span(4, 2), span(3, 1)]
    (batch,) = micro_batches(spans, [0, 1], PackingRules(max_tokens=16))
    assert batch.token_ids_T.tolist() == [400, 401, 402, 300, 301]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    assert read_rows(batch) == [(401, 402), (402, 403), (301, 302)]
    assert batch.weights_W.tolist() == [0.0, 0.0, 0.0]
    assert (batch.sample_ids, batch.rows_per_sample) == ((0, 1), (2, 1))


def test_weights_follow_their_rows() -> None:
    spans = [span(9, 3), span(3, 1), span(5, 4)]
    weights = [np.array(w, dtype=np.float32) for w in ([1, 2, 3], [4], [5, 6, 7, 8])]
    batches = micro_batches(spans, [0, 1, 2], PackingRules(max_tokens=8), weights)
    found = {
        target: weight
        for batch in batches
        for target, weight in zip(batch.targets_W.tolist(), batch.weights_W.tolist(), strict=True)
    }
    assert found == {906: 1, 907: 2, 908: 3, 302: 4, 501: 5, 502: 6, 503: 7, 504: 8}


def test_padding_is_one_more_sequence_without_rows() -> None:
    (batch,) = micro_batches([span(4, 3)], [0], PackingRules(max_tokens=16, multiple=8))
    assert len(batch.token_ids_T) == 8
    assert batch.cu_seqlens.tolist() == [0, 3, 8]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert read_rows(batch) == [(400, 401), (401, 402), (402, 403)]


def test_spans_without_scored_tokens_are_left_out() -> None:
    assert micro_batches([span(4, 0)], [0], PackingRules(max_tokens=16)) == []


@pytest.mark.parametrize("num_scored", [4, 5, -1])
def test_a_scored_first_token_is_refused(num_scored: int) -> None:
    with pytest.raises(ValueError, match="num_scored"):
        micro_batches([span(4, num_scored)], [0], PackingRules(max_tokens=16))


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("multiple", [1, 4])
def test_context_parallel_ranks_share_tokens_and_rows(cp: int, multiple: int) -> None:
    spans = [span(11, 7), span(30, 29)]
    weights = [np.arange(7, dtype=np.float32), np.arange(29, dtype=np.float32)]
    by_rank = [
        micro_batches(
            spans,
            [0, 1],
            PackingRules(max_tokens=64, multiple=multiple, cp=cp, cp_rank=rank),
            weights,
        )
        for rank in range(cp)
    ]
    for own in zip(*by_rank, strict=True):
        index = own[0].sample_ids[0]
        whole = spans[index]
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
        assert [weighted[token] for token in tokens[first:]] == weights[index].tolist()


def test_zigzag_gives_a_rank_one_early_and_one_late_chunk() -> None:
    rules = PackingRules(max_tokens=64, cp=2, cp_rank=0)
    (batch,) = micro_batches([span(9, 8)], [0], rules)
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
