"""The choice of a backend, and the large shapes that only a GPU can show."""

import pytest
import torch

from megadistill.head import score, weighted_nll
from megadistill.head.backend import backend_of
from tests.head.dense import make_case


def test_a_head_on_the_cpu_takes_torch_unless_told() -> None:
    case = make_case()
    assert backend_of(case.head()).__name__ == "megadistill.head.torch_rows"  # type: ignore[attr-defined]


def test_a_named_backend_is_taken(backend: str) -> None:
    case = make_case(backend=backend)
    assert backend_of(case.head()).__name__ == f"megadistill.head.{backend}_rows"  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_tile_has_the_logits_shape_and_the_asked_type(backend: str, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits_CV = torch.ones(3, 7, dtype=wide)
    tile_CV = backend_of(make_case(backend=backend).head()).make_tile(logits_CV, dtype)
    assert tile_CV.shape == logits_CV.shape
    assert tile_CV.dtype == dtype


@pytest.mark.gpu
def test_qwen_sized_vocabulary_on_a_gpu() -> None:
    """Log-probs, entropy, top-K and gradients of both backends agree in bf16 at real widths."""
    with torch.device("cuda"):
        cases = [
            make_case(
                num_tokens=700,
                hidden_size=1024,
                vocab_size=151936,
                num_padding=64,
                scale=0.1,
                dtype=torch.bfloat16,
                backend=backend,
            )
            for backend in ("torch", "triton")
        ]
    found = []
    for case in cases:
        head = case.head(256)
        loss, seen = weighted_nll(head, case.hidden_TD, case.targets_T, case.weights_T)
        torch.autograd.backward(loss)
        scores = score(head, case.hidden_TD, case.targets_T[:, None], top_k=64)
        assert (scores.logprobs_TK[:, 0] - seen.logprobs_T).abs().max() < 1e-5
        found.append((loss.detach(), seen.entropy_T, scores.top_logprobs_TK, *case.gradients()))
    for one, other in zip(*found, strict=True):
        assert (one.double() - other.double()).norm() < 1e-2 * one.double().norm()
