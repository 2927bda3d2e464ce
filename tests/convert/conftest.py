"""Tiny random models of every family, as transformers writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from megadistill.convert.hf_files import SafetensorsReader
from megadistill.convert.mapping import Read

Settings = Mapping[str, Any]  # arguments of a transformers configuration

FAMILIES: Mapping[str, Settings] = {
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 2},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2-untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 16},
    "qwen3-untied": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 16},
}
_MODELS = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}
SHAPE: Settings = {
    "vocab_size": 51,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""An odd vocabulary, so that two ranks need padding."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of one model a family; all their weights are random, norms and biases too."""
    root = tmp_path_factory.mktemp("models")
    return {name: _save_model(root / name, settings) for name, settings in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def model_dir(request: pytest.FixtureRequest, models: dict[str, Path]) -> Path:
    return models[request.param]


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    reader = SafetensorsReader(directory)
    return {name: reader.read(name).clone() for name in reader.names}


def reads(tensors: Mapping[str, torch.Tensor]) -> Read:
    return tensors.__getitem__


def assert_same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    """Equal names, dtypes and bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def _save_model(directory: Path, settings: Settings) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SHAPE, **settings})
    model = _MODELS[config.model_type](config)  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).bfloat16()
    model.save_pretrained(directory)
    return directory
