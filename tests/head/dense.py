"""The oracle: every quantity of the head from dense float64 logits, by its definition."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadistill.head import VocabularyHead


def assert_near(found: object, expected: object, tolerance: float) -> None:
    """Equal within `tolerance`, absolute or relative; pairs and other sequences item by item."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Inputs of one head, with gradients switched on."""

    hidden_TD: Tensor
    weight_VD: Tensor
    vocab_size: int
    targets_T: Tensor
    weights_T: Tensor
    backend: Any  # a backend's name, from a fixture

    def head(self, chunk_tokens: int | None = None, **options: Any) -> VocabularyHead:
        fields = {
            "weight_VD": self.weight_VD,
            "vocab_size": self.vocab_size,
            "chunk_tokens": chunk_tokens,
            "backend": self.backend,
        }
        return VocabularyHead(**(fields | options))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Take the gradients that backward left, and clear them."""
        hidden_TD, weight_VD = self.hidden_TD.grad, self.weight_VD.grad
        assert hidden_TD is not None
        assert weight_VD is not None
        self.hidden_TD.grad = self.weight_VD.grad = None
        return hidden_TD, weight_VD


def make_case(
    *,
    num_tokens: int = 13,
    hidden_size: int = 8,
    vocab_size: int = 37,
    num_padding: int = 3,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    backend: str = "auto",
) -> Case:
    """The same numbers on every device; tensors lie on the default one."""
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        return drawn.to(device)

    hidden_TD = (normal(num_tokens, hidden_size) * scale).to(dtype)
    targets_T = torch.randint(vocab_size, (num_tokens,), generator=generator, device="cpu")
    return Case(
        hidden_TD=hidden_TD.requires_grad_(),
        weight_VD=normal(vocab_size + num_padding, hidden_size).to(dtype).requires_grad_(),
        vocab_size=vocab_size,
        targets_T=targets_T.to(device),
        weights_T=normal(num_tokens),
        backend=backend,
    )


def dense_logprobs(case: Case, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `[T, V]` in float64; autograd runs through them."""
    weight_VD = case.weight_VD[: case.vocab_size].double()
    return torch.log_softmax(case.hidden_TD.double() @ weight_VD.t() / temperature, -1)


def dense_entropy(logprobs_TV: Tensor) -> Tensor:
    return -(logprobs_TV.exp() * logprobs_TV).sum(-1)


def dense_kl(left_TV: Tensor, right_TV: Tensor) -> Tensor:
    return (left_TV.exp() * (left_TV - right_TV)).sum(-1)


def dense_jsd(student_TV: Tensor, teacher_TV: Tensor, beta: float) -> Tensor:
    """`beta KL(T || M) + (1 - beta) KL(S || M)`, with log M by log-sum-exp."""
    parts = torch.stack((teacher_TV + math.log(beta), student_TV + math.log(1.0 - beta)))
    mixture_TV = torch.logsumexp(parts, 0)
    return beta * dense_kl(teacher_TV, mixture_TV) + (1 - beta) * dense_kl(student_TV, mixture_TV)
