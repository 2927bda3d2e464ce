"""The one-pass weighted negative log-likelihood against autograd through dense logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megadistill.head import VocabularyHead, weighted_nll
from tests.head.dense import Case, dense_entropy, dense_logprobs, make_case


def dense_nll(case: Case, temperature: float = 1.0) -> Tensor:
    logprobs_TV = dense_logprobs(case, temperature)
    picked_T = logprobs_TV.gather(1, case.targets_T[:, None]).squeeze(1)
    return -(case.weights_T * picked_T).sum()


def run(case: Case, head: VocabularyHead, temperature: float = 1.0) -> Tensor:
    loss, _ = weighted_nll(
        head, case.hidden_TD, case.targets_T, case.weights_T, temperature=temperature
    )
    torch.autograd.backward(loss)
    return loss.detach()


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 9),
    vocab_size=st.integers(1, 40),
    num_padding=st.integers(0, 5),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 3000.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    chunk_tokens=st.integers(1, 10),
)
def test_loss_statistics_and_gradients_equal_the_dense_oracle(
    backend: str,
    num_tokens: int,
    vocab_size: int,
    num_padding: int,
    scale: float,
    temperature: float,
    chunk_tokens: int,
) -> None:
    case = make_case(
        num_tokens=num_tokens,
        vocab_size=vocab_size,
        num_padding=num_padding,
        scale=scale,
        backend=backend,
    )
    loss, statistics = weighted_nll(
        case.head(chunk_tokens),
        case.hidden_TD,
        case.targets_T,
        case.weights_T,
        temperature=temperature,
    )
    torch.autograd.backward(3.0 * loss)
    found = case.gradients()
    expected = dense_nll(case, temperature)
    torch.autograd.backward(3.0 * expected)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, case.gradients(), atol=1e-8 * max(scale, 1.0), rtol=1e-6)
    logprobs_TV = dense_logprobs(case, temperature).detach()
    torch.testing.assert_close(
        statistics.logprobs_T, logprobs_TV.gather(1, case.targets_T[:, None]).squeeze(1)
    )
    torch.testing.assert_close(
        statistics.entropy_T, dense_entropy(logprobs_TV), atol=1e-9, rtol=1e-7
    )


def test_gradcheck(backend: str) -> None:
    case = make_case(num_tokens=4, hidden_size=3, vocab_size=5, num_padding=2, backend=backend)

    def loss(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        head = case.head(3, weight_VD=weight_VD)
        return weighted_nll(head, hidden_TD, case.targets_T, case.weights_T, temperature=0.7)[0]

    assert torch.autograd.gradcheck(
        loss, (case.hidden_TD, case.weight_VD), fast_mode=backend == "triton"
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_gradients_in_training_precision(
    backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    case = make_case(
        num_tokens=50, hidden_size=32, vocab_size=5000, scale=0.5, dtype=dtype, backend=backend
    )
    run(case, case.head(16))
    found = case.gradients()
    torch.autograd.backward(dense_nll(case))
    for gradient, expected in zip(found, case.gradients(), strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() - expected.double()).norm() / expected.double().norm()
        assert error < tolerance


def test_a_confident_token_keeps_its_small_gradient(backend: str) -> None:
    """1 - p = 1e-3 must not drown in the rounding of p to bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(
            num_tokens=1, hidden_size=1, vocab_size=2, num_padding=0, dtype=dtype, backend=backend
        )
        with torch.no_grad():
            case.hidden_TD.fill_(1.0)
            case.weight_VD.copy_(torch.tensor([[6.90625], [0.0]]))
            case.targets_T.fill_(0)
        run(case, case.head())
        _, found = case.gradients()
        torch.autograd.backward(dense_nll(case))
        torch.testing.assert_close(found, case.gradients()[1], atol=0.0, rtol=1e-2)


def test_chunk_size_changes_nothing(backend: str) -> None:
    case = make_case(num_tokens=30, vocab_size=60, backend=backend)
    whole_loss, whole = run(case, case.head()), case.gradients()
    for chunk_tokens in (1, 7, 30, 64):
        torch.testing.assert_close(run(case, case.head(chunk_tokens)), whole_loss)
        torch.testing.assert_close(case.gradients(), whole)


def test_zero_weights_give_zero_gradients(backend: str) -> None:
    case = make_case(scale=300.0, backend=backend)
    case.weights_T.zero_()
    assert run(case, case.head()) == 0.0
    assert all(not gradient.any() for gradient in case.gradients())


def test_padding_rows_get_no_gradient(backend: str) -> None:
    case = make_case(vocab_size=20, num_padding=12, backend=backend)
    run(case, case.head())
    _, weight_gradient_VD = case.gradients()
    assert not weight_gradient_VD[20:].any()


def test_only_wanted_gradients_are_made(backend: str) -> None:
    case = make_case(backend=backend)
    frozen = case.head(weight_VD=case.weight_VD.detach())
    run(case, frozen)
    assert case.hidden_TD.grad is not None
    with torch.no_grad():
        loss, _ = weighted_nll(case.head(), case.hidden_TD, case.targets_T, case.weights_T)
    assert not loss.requires_grad


def test_main_grad_receives_the_gradient_in_fp32_and_accumulates(backend: str) -> None:
    case = make_case(num_tokens=40, vocab_size=300, dtype=torch.bfloat16, backend=backend)
    run(case, case.head())
    _, expected = case.gradients()
    main_grad = torch.ones(case.weight_VD.shape, dtype=torch.float32)
    case.weight_VD.main_grad = main_grad  # type: ignore[attr-defined]
    head = case.head(accumulate_into_main_grad=True)
    for _ in range(2):
        run(case, head)
    assert case.weight_VD.grad is None
    torch.testing.assert_close((main_grad - 1.0) / 2.0, expected.float(), atol=1e-6, rtol=5e-3)


def test_main_grad_refuses_a_factor_that_comes_too_late(backend: str) -> None:
    case = make_case(dtype=torch.float32, backend=backend)
    case.weight_VD.main_grad = torch.zeros_like(case.weight_VD)  # type: ignore[attr-defined]
    head = case.head(accumulate_into_main_grad=True)
    loss, _ = weighted_nll(head, case.hidden_TD, case.targets_T, case.weights_T)
    with pytest.raises(ValueError, match="row weights"):
        torch.autograd.backward(2.0 * loss)


def test_main_grad_in_a_narrow_type_is_refused(backend: str) -> None:
    case = make_case(dtype=torch.float32, backend=backend)
    case.weight_VD.main_grad = torch.zeros_like(case.weight_VD).bfloat16()  # type: ignore[attr-defined]
    head = case.head(accumulate_into_main_grad=True)
    with pytest.raises(ValueError, match="main_grad must be"):
        weighted_nll(head, case.hidden_TD, case.targets_T, case.weights_T)


@pytest.mark.parametrize("tied", [False, True])
def test_main_grad_speaks_megatrons_protocol(backend: str, tied: bool) -> None:
    case = make_case(dtype=torch.float32, backend=backend)
    parameter = case.weight_VD
    parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    parameter.zero_out_wgrad = tied  # type: ignore[attr-defined]
    head = case.head(accumulate_into_main_grad=True)
    run(case, head)
    assert parameter.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert parameter.grad is not None
    assert parameter.grad.shape == parameter.shape
    if tied:
        assert not parameter.grad.any()
