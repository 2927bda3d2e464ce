"""Small random Hugging Face models, and the numbers that they give for our engine to match."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from megadistill.types import Sample, TokenSpan, TopK
from tests.megatron.reference import (
    TEMPERATURE,
    TOP_K,
    VOCAB_SIZE,
    Reference,
    random_samples,
    random_spans,
    reversed_top_k,
)

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


def write_model(
    case: Case, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """Save the case's random model and return its directory."""
    torch.manual_seed(seed)
    model = case.model(case.config(**{**_SHAPE, **case.settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Norm weights start at one and biases at zero: a wrong mapping would not show.
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    torch.nn.Module.to(model, dtype=dtype)  # in place; transformers' own method is not typed
    model.save_pretrained(directory / case.name)
    return directory / case.name


def reference(model_dir: Path, lengths: Sequence[int]) -> Reference:
    """Scores, and three AdamW steps with the gradient clipped to norm one."""
    model = read_model(model_dir)
    spans, samples = random_spans(lengths), random_samples(lengths)
    with torch.no_grad():
        scores = [token_logprobs(model, span) for span in spans]
        tops = [top_k(rows, span) for rows, span in zip(scores, spans, strict=True)]
        kl = sum(distillation(model, s, t) for s, t in zip(samples, tops, strict=True))
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses, grad_norms = [], []
    gradients: dict[str, Tensor] = {}
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        total = loss(model, samples)
        torch.autograd.backward(total)
        grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(total.item())
        if not gradients:
            named = model.named_parameters()
            gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    return Reference(
        spans=spans,
        logprobs=[scored(rows, span).numpy() for rows, span in zip(scores, spans, strict=True)],
        entropy=sum(
            float(-(rows.exp() * rows).sum(-1)[-span.num_scored :].sum())
            for rows, span in zip(scores, spans, strict=True)
        ),
        tops=tops,
        kl=kl,
        samples=samples,
        losses=losses,
        grad_norms=grad_norms,
        gradients=gradients,
        weights={name: p.detach().clone() for name, p in model.named_parameters()},
        last_loss=loss(model, samples[:1]).item(),
    )


def read_model(model_dir: Path) -> torch.nn.Module:
    """The saved model in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    assert isinstance(model, torch.nn.Module)
    return model


def token_logprobs(model: torch.nn.Module, span: TokenSpan) -> Tensor:
    """fp32 `[N - 1, vocabulary]` log-probabilities, with gradient."""
    ids = torch.from_numpy(span.token_ids_N.astype(np.int64))
    rows: Tensor = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
    return rows


def scored(rows: Tensor, span: TokenSpan) -> Tensor:
    """The scored tokens' entries of `token_logprobs`."""
    targets = torch.from_numpy(span.token_ids_N[1:].astype(np.int64))
    return rows.gather(1, targets[:, None])[len(rows) - span.num_scored :, 0]


def top_k(rows: Tensor, span: TokenSpan) -> TopK:
    """The scored tokens' most likely ids at the temperature."""
    found = (rows / TEMPERATURE).log_softmax(-1)[len(rows) - span.num_scored :].topk(TOP_K)
    return TopK(ids_RK=found.indices.int().numpy(), logprobs_RK=found.values.numpy())


def distillation(model: torch.nn.Module, sample: Sample, top: TopK) -> float:
    """One sample's part of RAFT's L_KL with the reversed top K as the teacher."""
    rows = (token_logprobs(model, sample.span) / TEMPERATURE).log_softmax(-1).double()
    ids = torch.from_numpy(top.ids_RK.astype(np.int64))
    p = rows[len(rows) - sample.span.num_scored :].gather(1, ids).log_softmax(-1)
    q = torch.from_numpy(reversed_top_k(top).logprobs_RK).double().log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1)
    return float(TEMPERATURE**2 * (torch.from_numpy(sample.weights_R) * kl).sum())


def loss(model: torch.nn.Module, samples: Sequence[Sample]) -> Tensor:
    """-sum of weights x log-probabilities."""
    terms = [
        (scored(token_logprobs(model, s.span), s.span) * torch.from_numpy(s.weights_R)).sum()
        for s in samples
    ]
    return -torch.stack(terms).sum()
