"""Random models small enough for a CPU test, and transformers as the oracle for engines.

Shape legend: R response tokens, N prompt and response tokens, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from megadistill.types import Rollout

EOS = 2
VOCABULARY = 512

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "initializer_range": 0.1,
}


def llama(seed: int) -> PreTrainedModel:
    """Untied embeddings."""
    return _model(LlamaConfig(tie_word_embeddings=False, **SHAPE), seed)


def qwen2(seed: int) -> PreTrainedModel:
    """Tied embeddings, and biases in attention."""
    return _model(Qwen2Config(tie_word_embeddings=True, **SHAPE), seed)


def _model(config: LlamaConfig | Qwen2Config, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.train(False)
    return model


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Write a Hugging Face directory without tokenizer."""
    model.save_pretrained(directory)
    return directory


def published_tensors(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Tensors as a trainer publishes them: a tied head is left out."""
    tied = model.config.tie_word_embeddings
    tensors = model.state_dict().items()
    return [(name, value) for name, value in tensors if not (tied and name == "lm_head.weight")]


@torch.inference_mode()
def oracle_logits(model: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """fp32 logits that predict each response token."""
    prompt, response = list(rollout.prompt.token_ids), rollout.response_ids_R.tolist()
    logits_NV: torch.Tensor = model(torch.tensor([prompt + response])).logits[0].float()
    return logits_NV[len(prompt) - 1 : -1]


def oracle_logprobs(model: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """fp32 log-probabilities of the response tokens."""
    logprobs_RV = oracle_logits(model, rollout).log_softmax(-1)
    return sampled(logprobs_RV, rollout)


def sampled(logprobs_RV: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    ids_R = torch.from_numpy(rollout.response_ids_R).long()
    return logprobs_RV.gather(1, ids_R[:, None])[:, 0]
