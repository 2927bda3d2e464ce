"""Scores against the dense oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.head import score
from megadistill.head.rows import TOP_K_GROUP
from tests.head.dense import dense_entropy, dense_logprobs, make_case


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 9),
    vocab_size=st.integers(1, 40),
    num_padding=st.integers(0, 5),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 3000.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    chunk_tokens=st.integers(1, 10),
    data=st.data(),
)
def test_score_equals_the_dense_oracle(
    backend: str,
    num_tokens: int,
    vocab_size: int,
    num_padding: int,
    scale: float,
    temperature: float,
    chunk_tokens: int,
    data: st.DataObject,
) -> None:
    case = make_case(
        num_tokens=num_tokens,
        vocab_size=vocab_size,
        num_padding=num_padding,
        scale=scale,
        backend=backend,
    )
    num_ids = data.draw(st.sampled_from([1, vocab_size]))
    top_k = data.draw(st.sampled_from([0, 1, vocab_size]))
    ids_TK = torch.randint(vocab_size, (num_tokens, num_ids))
    scores = score(
        case.head(chunk_tokens),
        case.hidden_TD,
        ids_TK,
        temperature=temperature,
        top_k=top_k,
        with_entropy=True,
    )
    expected_TV = dense_logprobs(case, temperature).detach()
    torch.testing.assert_close(scores.logprobs_TK, expected_TV.gather(1, ids_TK))
    assert scores.entropy_T is not None
    torch.testing.assert_close(scores.entropy_T, dense_entropy(expected_TV), atol=1e-9, rtol=1e-7)
    if top_k == 0:
        assert scores.top_ids_TK is None
        return
    assert scores.top_ids_TK is not None
    assert scores.top_logprobs_TK is not None
    torch.testing.assert_close(scores.top_logprobs_TK, expected_TV.topk(top_k).values)
    torch.testing.assert_close(
        expected_TV.gather(1, scores.top_ids_TK), scores.top_logprobs_TK, atol=1e-9, rtol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_never_see_rounded_logits(backend: str, dtype: torch.dtype) -> None:
    case = make_case(
        num_tokens=20,
        hidden_size=64,
        vocab_size=3000,
        num_padding=0,
        scale=0.5,
        dtype=dtype,
        backend=backend,
    )
    ids_TK = case.targets_T[:, None]
    scores = score(case.head(7), case.hidden_TD, ids_TK, with_entropy=True)
    expected_TV = dense_logprobs(case).detach()
    assert scores.logprobs_TK.dtype == torch.float32
    assert scores.entropy_T is not None
    error = (scores.logprobs_TK - expected_TV.gather(1, ids_TK)).abs().max()
    assert error < 1e-5
    assert (scores.entropy_T - dense_entropy(expected_TV)).abs().max() < 1e-5


def test_huge_logits_lose_nothing_where_the_maximum_is_shared(backend: str) -> None:
    case = make_case(
        num_tokens=1,
        hidden_size=1,
        vocab_size=3,
        num_padding=0,
        dtype=torch.float32,
        backend=backend,
    )
    with torch.no_grad():
        case.hidden_TD.fill_(1.0)
        case.weight_VD.copy_(torch.tensor([[1e4], [1e4], [-1e4]]))
    scores = score(case.head(), case.hidden_TD, torch.tensor([[0, 1, 2]]), with_entropy=True)
    expected = torch.tensor([[-0.6931472, -0.6931472, -2e4 - 0.6931472]])
    torch.testing.assert_close(scores.logprobs_TK, expected)
    torch.testing.assert_close(scores.entropy_T, torch.tensor([0.6931472]))


@pytest.mark.parametrize("top_k", [1, 7, 20])
@pytest.mark.parametrize("num_levels", [3, 10**6])
def test_top_k_is_exact_among_many_groups_and_ties(
    backend: str, top_k: int, num_levels: int
) -> None:
    """A vocabulary of several groups and a rest; three levels make nearly every logit a tie."""
    case = make_case(num_tokens=6, vocab_size=25 * TOP_K_GROUP + 9, backend=backend)
    with torch.no_grad():
        case.hidden_TD.mul_(num_levels).round_().div_(num_levels)
        case.weight_VD.mul_(num_levels).round_().div_(num_levels)
    scores = score(case.head(4), case.hidden_TD, case.targets_T[:, None], top_k=top_k)
    expected_TV = dense_logprobs(case).detach()
    assert scores.top_ids_TK is not None
    assert scores.top_logprobs_TK is not None
    assert all(len(set(ids)) == top_k for ids in scores.top_ids_TK.tolist())
    torch.testing.assert_close(scores.top_logprobs_TK, expected_TV.topk(top_k).values)
    torch.testing.assert_close(
        expected_TV.gather(1, scores.top_ids_TK), scores.top_logprobs_TK, atol=1e-9, rtol=1e-7
    )
