"""Two-pass log-probs against autograd through dense logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megadistill.head import logprobs
from tests.head.dense import assert_near, dense_logprobs, make_case


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 9),
    vocab_size=st.integers(1, 40),
    num_padding=st.integers(0, 5),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 3000.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    chunk_tokens=st.integers(1, 10),
    every_id=st.booleans(),
)
def test_values_and_gradients_equal_the_dense_oracle(
    backend: str,
    num_tokens: int,
    vocab_size: int,
    num_padding: int,
    scale: float,
    temperature: float,
    chunk_tokens: int,
    every_id: bool,
) -> None:
    case = make_case(
        num_tokens=num_tokens,
        vocab_size=vocab_size,
        num_padding=num_padding,
        scale=scale,
        backend=backend,
    )
    num_ids = vocab_size if every_id else min(2, vocab_size)
    ids_TK = torch.randint(vocab_size, (num_tokens, num_ids))
    slopes_TK = torch.randn(num_tokens, num_ids, dtype=torch.float64)
    found_TK = logprobs(case.head(chunk_tokens), case.hidden_TD, ids_TK, temperature=temperature)
    torch.autograd.backward(found_TK, slopes_TK)
    found = case.gradients()
    expected_TK = dense_logprobs(case, temperature).gather(1, ids_TK)
    torch.autograd.backward(expected_TK, slopes_TK)
    assert_near(found_TK, expected_TK, 1e-9)
    assert_near(found, case.gradients(), 1e-8 * max(scale, 1.0))


def test_gradcheck(backend: str) -> None:
    case = make_case(num_tokens=4, hidden_size=3, vocab_size=5, num_padding=2, backend=backend)
    ids_TK = torch.tensor([[0, 1], [2, 2], [4, 0], [3, 1]])

    def values(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        head = case.head(3, weight_VD=weight_VD)
        return logprobs(head, hidden_TD, ids_TK, temperature=0.7)

    assert torch.autograd.gradcheck(
        values, (case.hidden_TD, case.weight_VD), fast_mode=backend == "triton"
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_training_precision(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    case = make_case(
        num_tokens=50, hidden_size=32, vocab_size=5000, scale=0.5, dtype=dtype, backend=backend
    )
    ids_TK = torch.randint(5000, (50, 4))
    slopes_TK = torch.randn(50, 4)
    torch.autograd.backward(logprobs(case.head(16), case.hidden_TD, ids_TK), slopes_TK)
    found = case.gradients()
    torch.autograd.backward(dense_logprobs(case).gather(1, ids_TK), slopes_TK.double())
    for gradient, expected in zip(found, case.gradients(), strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() - expected.double()).norm() / expected.double().norm()
        assert error < tolerance


def test_main_grad_receives_the_gradient(backend: str) -> None:
    case = make_case(dtype=torch.float32, backend=backend)
    ids_TK = case.targets_T[:, None]
    logprobs(case.head(), case.hidden_TD, ids_TK).sum().backward()  # type: ignore[no-untyped-call]
    _, expected = case.gradients()
    case.weight_VD.main_grad = torch.zeros_like(case.weight_VD)  # type: ignore[attr-defined]
    head = case.head(accumulate_into_main_grad=True)
    logprobs(head, case.hidden_TD, ids_TK).sum().backward()  # type: ignore[no-untyped-call]
    assert case.weight_VD.grad is None
    assert_near(case.weight_VD.main_grad, expected, 1e-6)  # type: ignore[attr-defined]
