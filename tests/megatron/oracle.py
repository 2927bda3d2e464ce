"""Small random Hugging Face models, and the numbers that they give for our engine to match."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from megadistill.types import FloatArray, Sample, TokenSpan

VOCAB_SIZE = 259
"""Odd, so that tensor parallelism must pad it."""
NUM_STEPS = 3
LEARNING_RATE = 1e-3

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.08,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One small model."""

    name: str
    config: type[transformers.PretrainedConfig]
    model: type[transformers.PreTrainedModel]
    settings: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case(
        name="qwen3_untied",
        config=transformers.Qwen3Config,
        model=transformers.Qwen3ForCausalLM,
        settings={"tie_word_embeddings": False},
    ),
    Case(
        name="qwen2_tied",
        config=transformers.Qwen2Config,
        model=transformers.Qwen2ForCausalLM,
        settings={"tie_word_embeddings": True},
    ),
    Case(
        name="llama3_untied",
        config=transformers.LlamaConfig,
        model=transformers.LlamaForCausalLM,
        settings={"tie_word_embeddings": False, "rope_parameters": _LLAMA3},
    ),
    Case(
        name="llama_tied",
        config=transformers.LlamaConfig,
        model=transformers.LlamaForCausalLM,
        settings={"tie_word_embeddings": True, "num_key_value_heads": 8},
    ),
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What Hugging Face and torch give in fp32 for one model."""

    spans: list[TokenSpan]
    logprobs: list[FloatArray]
    samples: list[Sample]
    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, torch.Tensor]
    """Of the first step, clipped."""
    weights: dict[str, torch.Tensor]
    """After the last step."""
    last_loss: float
    """Of the first sample alone, after the last step."""


def write_model(case: Case, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save the case's random model and return its directory."""
    torch.manual_seed(0)
    model = case.model(case.config(**{**_SHAPE, **case.settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Norm weights start at one and biases at zero: a wrong mapping would not show.
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(directory / case.name)
    return directory / case.name


def reference(model_dir: Path, lengths: Sequence[int]) -> Reference:
    """Log-probabilities, and three AdamW steps with the gradient clipped to norm one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    spans, samples = random_spans(lengths), random_samples(lengths)
    with torch.no_grad():
        scores = [logprobs(model, span).numpy() for span in spans]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses, grad_norms, gradients = [], [], {}
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        total = loss(model, samples)
        total.backward()
        grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(float(total))
        if not gradients:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    return Reference(
        spans=spans,
        logprobs=scores,
        samples=samples,
        losses=losses,
        grad_norms=grad_norms,
        gradients=gradients,
        weights={name: p.detach().clone() for name, p in model.named_parameters()},
        last_loss=float(loss(model, samples[:1])),
    )


def random_spans(lengths: Sequence[int], seed: int = 0) -> list[TokenSpan]:
    """Spans of these lengths; about two thirds of each are scored."""
    rng = np.random.default_rng(seed)
    return [
        TokenSpan(token_ids_N=rng.integers(0, VOCAB_SIZE, n, dtype=np.int32), num_scored=2 * n // 3)
        for n in lengths
    ]


def random_samples(lengths: Sequence[int], seed: int = 0) -> list[Sample]:
    """Samples of these lengths with weights of both signs, some zero."""
    rng = np.random.default_rng(seed + 1)
    samples = []
    for span in random_spans(lengths, seed):
        weights = rng.normal(0.3, 1.0, span.num_scored) / len(lengths) / span.num_scored
        weights[rng.random(span.num_scored) < 0.2] = 0.0
        samples.append(Sample(span=span, weights_R=weights.astype(np.float32), component="general"))
    return samples


def logprobs(model: torch.nn.Module, span: TokenSpan) -> torch.Tensor:
    """fp32 log-probabilities of the scored tail, with gradient."""
    ids = torch.from_numpy(span.token_ids_N.astype(np.int64))
    logits = model(input_ids=ids[None]).logits[0].float()
    scored = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])
    return scored[len(ids) - 1 - span.num_scored :, 0]


def loss(model: torch.nn.Module, samples: Sequence[Sample]) -> torch.Tensor:
    """-sum of weights x log-probabilities."""
    terms = [(logprobs(model, s.span) * torch.from_numpy(s.weights_R)).sum() for s in samples]
    return -torch.stack(terms).sum()
