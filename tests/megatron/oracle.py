"""Small random Hugging Face models, and the numbers that they give for our engine to match."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from megadistill.types import Int32Array, Sample, TokenScores, TokenSpan, TopK
from tests.megatron.reference import (
    TEMPERATURE,
    TOP_K,
    VOCAB_SIZE,
    Reference,
    asked_ids,
    random_samples,
    random_spans,
    reversed_top_k,
    teacher_of,
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

TEACHERS = {
    "shallow": Case(
        name="shallow",
        config=transformers.Qwen3Config,
        model=transformers.Qwen3ForCausalLM,
        settings={
            "tie_word_embeddings": False,
            "num_hidden_layers": 2,
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB_SIZE + 4,  # rows that the student does not have
        },
    ),
    "wide": Case(
        name="wide",
        config=transformers.LlamaConfig,
        model=transformers.LlamaForCausalLM,
        settings={"tie_word_embeddings": True, "num_hidden_layers": 6, "hidden_size": 96},
    ),
}
"""Of other families, depths and widths than the students."""


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


def reference(model_dir: Path, lengths: Sequence[int], teachers: Mapping[str, Path]) -> Reference:
    """Scores, a distillation gradient, and three AdamW steps with the gradient clipped to norm one."""
    model = read_model(model_dir)
    frozen = {name: read_model(path) for name, path in teachers.items()}
    spans, samples = random_spans(lengths), random_samples(lengths)
    with torch.no_grad():
        scores = [token_logprobs(model, span) for span in spans]
        tops = [top_k(rows, span) for rows, span in zip(scores, spans, strict=True)]
        kl = sum(distillation(model, s, t) for s, t in zip(samples, tops, strict=True))
        taught = [
            common_logprobs(frozen[teacher_of(index)], span) for index, span in enumerate(spans)
        ]
        supported = sum(
            reverse_with_tail(model, sample, common_logprobs(frozen["shallow"], sample.span))
            for sample in samples
        )
    divergence = torch.stack(
        [jensen_shannon(model, s, rows) for s, rows in zip(samples, taught, strict=True)]
    ).sum()
    torch.autograd.backward(loss(model, samples) + divergence)
    named = model.named_parameters()
    distilled_gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
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
        teacher=[
            answered(common_logprobs(frozen["shallow"], span), ids_RK)
            for span, ids_RK in zip(spans, asked_ids(spans), strict=True)
        ],
        distilled=divergence.item(),
        supported=supported,
        distilled_gradients=distilled_gradients,
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


@torch.no_grad()
def common_logprobs(teacher: torch.nn.Module, span: TokenSpan) -> Tensor:
    """A teacher's `token_logprobs` over the ids that the student has."""
    ids = torch.from_numpy(span.token_ids_N.astype(np.int64))
    logits: Tensor = teacher(input_ids=ids[None]).logits[0, :-1, :VOCAB_SIZE]
    return logits.float().log_softmax(-1)


def jensen_shannon(model: torch.nn.Module, sample: Sample, teacher: Tensor) -> Tensor:
    """One sample's part of the divergence: JSD at beta 1/2 and temperature 1, weighted."""
    num_scored = sample.span.num_scored
    p, q = (rows[-num_scored:].double() for rows in (token_logprobs(model, sample.span), teacher))
    middle = ((p.exp() + q.exp()) / 2).log()
    values = ((q.exp() * (q - middle)).sum(-1) + (p.exp() * (p - middle)).sum(-1)) / 2
    assert sample.divergence_weights_R is not None
    return (torch.from_numpy(sample.divergence_weights_R) * values).sum()


@torch.no_grad()
def reverse_with_tail(model: torch.nn.Module, sample: Sample, teacher: Tensor) -> float:
    """One sample's part of T^2 KL(student || teacher) on the student's top K and the rest."""
    p, q = (
        (rows[-sample.span.num_scored :] / TEMPERATURE).double().log_softmax(-1).exp()
        for rows in (token_logprobs(model, sample.span), teacher)
    )
    ids = p.topk(TOP_K).indices
    p, q = (rows.gather(1, ids) for rows in (p, q))
    p, q = (torch.cat((inside, 1 - inside.sum(-1, keepdim=True)), 1) for inside in (p, q))
    assert sample.divergence_weights_R is not None
    weights = torch.from_numpy(sample.divergence_weights_R)
    return float(TEMPERATURE**2 * (weights * (p * (p / q).log()).sum(-1)).sum())


def answered(rows: Tensor, ids_RK: Int32Array) -> TokenScores:
    """What `read` should say about the last rows: entropy, and log-probabilities when cooled."""
    tail = rows[len(rows) - len(ids_RK) :]
    cooled = (tail / TEMPERATURE).log_softmax(-1)
    return TokenScores(
        logprobs_R=np.zeros(len(ids_RK), dtype=np.float32),
        entropy_R=-(tail.exp() * tail).sum(-1).numpy(),
        at_ids_RK=cooled.gather(1, torch.from_numpy(ids_RK.astype(np.int64))).numpy(),
    )


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
