"""Full-vocabulary divergences against the dense oracle."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megadistill.head import VocabularyHead, divergences, forward_kl, jsd, reverse_kl
from tests.head.dense import Case, assert_near, dense_jsd, dense_kl, dense_logprobs, make_case

Differentiable = Callable[..., tuple[Tensor, Tensor]]
DIFFERENTIABLE: dict[str, tuple[Differentiable, Callable[[Tensor, Tensor], Tensor]]] = {
    "forward": (forward_kl, lambda student, teacher: dense_kl(teacher, student)),
    "reverse": (reverse_kl, dense_kl),
    "jsd": (
        lambda *args, **kwargs: jsd(*args, beta=0.3, **kwargs),
        lambda student, teacher: dense_jsd(student, teacher, 0.3),
    ),
}


def make_pair(
    backend: str, num_tokens: int, vocab_size: int, scale: float = 1.0
) -> tuple[Case, Case]:
    """A student, and a teacher of another width and padding."""
    make = partial(
        make_case, num_tokens=num_tokens, vocab_size=vocab_size, scale=scale, backend=backend
    )
    return make(num_padding=2), make(num_padding=4, hidden_size=5, seed=1)


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 7),
    vocab_size=st.integers(1, 30),
    scale=st.sampled_from([0.1, 1.0, 30.0, 3000.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    chunk_tokens=st.integers(1, 8),
)
def test_values_and_gradients_equal_the_dense_oracle(
    backend: str,
    num_tokens: int,
    vocab_size: int,
    scale: float,
    temperature: float,
    chunk_tokens: int,
) -> None:
    student, teacher = make_pair(backend, num_tokens, vocab_size, scale)
    student_TV = dense_logprobs(student, temperature)
    teacher_TV = dense_logprobs(teacher, temperature).detach()
    inputs = student.head(chunk_tokens), student.hidden_TD, teacher.head(), teacher.hidden_TD
    values = divergences(*inputs, temperature=temperature)
    expected = {name: dense(student_TV, teacher_TV) for name, (_, dense) in DIFFERENTIABLE.items()}
    tolerance = 1e-8 * max(scale, 1.0)
    assert_near(values.forward_kl_T, expected["forward"].detach(), tolerance)
    assert_near(values.reverse_kl_T, expected["reverse"].detach(), tolerance)
    for name, (function, _) in DIFFERENTIABLE.items():
        loss, values_T = function(*inputs, student.weights_T, temperature=temperature)
        assert_near(values_T, expected[name].detach(), tolerance)
        torch.autograd.backward(2.0 * loss)
        found = student.gradients()
        expected_loss = 2.0 * (student.weights_T * expected[name]).sum()
        torch.autograd.backward(expected_loss, retain_graph=True)
        assert_near(found, student.gradients(), tolerance)
        assert teacher.hidden_TD.grad is None
        assert teacher.weight_VD.grad is None


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(backend: str, name: str) -> None:
    student, teacher = make_pair(backend, 4, 5)
    function, _ = DIFFERENTIABLE[name]

    def loss(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        head = student.head(3, weight_VD=weight_VD)
        return function(
            head, hidden_TD, teacher.head(), teacher.hidden_TD, student.weights_T, temperature=1.4
        )[0]

    assert torch.autograd.gradcheck(
        loss, (student.hidden_TD, student.weight_VD), fast_mode=backend == "triton"
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
def test_training_precision(backend: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    cases = [
        make_case(
            num_tokens=40,
            hidden_size=32,
            vocab_size=4000,
            scale=0.3,
            dtype=dtype,
            seed=s,
            backend=backend,
        )
        for s in (0, 1)
    ]
    student, teacher = cases
    function, dense = DIFFERENTIABLE[name]
    inputs = student.head(16), student.hidden_TD, teacher.head(), teacher.hidden_TD
    loss, values_T = function(*inputs, student.weights_T)
    torch.autograd.backward(loss)
    found = student.gradients()
    expected_T = dense(dense_logprobs(student), dense_logprobs(teacher).detach())
    assert (values_T - expected_T).abs().max() < 1e-5
    torch.autograd.backward((student.weights_T * expected_T).sum())
    for gradient, expected in zip(found, student.gradients(), strict=True):
        error = (gradient.double() - expected.double()).norm() / expected.double().norm()
        assert error < tolerance


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_model_against_itself_is_exactly_zero(backend: str, name: str) -> None:
    case = make_case(dtype=torch.float32, backend=backend)
    function, _ = DIFFERENTIABLE[name]
    _, values_T = function(
        case.head(4), case.hidden_TD, case.head(4), case.hidden_TD, case.weights_T
    )
    tolerance = 1e-7 if name == "jsd" else 0.0  # the mixture's logarithm rounds
    assert values_T.abs().max() <= tolerance


def one_row(backend: Any, probabilities: list[float]) -> tuple[VocabularyHead, Tensor]:
    logits_V1 = torch.tensor(probabilities, dtype=torch.float64).log()[:, None]
    head = VocabularyHead(weight_VD=logits_V1, vocab_size=len(probabilities), backend=backend)
    return head, torch.ones(1, 1, dtype=torch.float64)


def test_kl_of_the_worked_example(backend: str) -> None:
    values = divergences(*one_row(backend, [0.5, 0.3, 0.2]), *one_row(backend, [0.2, 0.5, 0.3]))
    assert values.reverse_kl_T.item() == pytest.approx(0.223805, abs=5e-7)


def test_jsd_by_hand(backend: str) -> None:
    """S = (1/2, 1/2), T = (1/4, 3/4), beta 1/2: M = (3/8, 5/8)."""
    _, values_T = jsd(
        *one_row(backend, [0.5, 0.5]),
        *one_row(backend, [0.25, 0.75]),
        torch.ones(1, dtype=torch.float64),
        beta=0.5,
    )
    # half of (1/4 ln 2/3 + 3/4 ln 6/5) plus half of (1/2 ln 4/3 + 1/2 ln 4/5)
    assert values_T.item() == pytest.approx(0.03382207, abs=1e-7)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1])
def test_jsd_refuses_its_limits(backend: str, beta: float) -> None:
    row = one_row(backend, [0.5, 0.5])
    with pytest.raises(ValueError, match="beta"):
        jsd(*row, *row, torch.ones(1), beta=beta)
