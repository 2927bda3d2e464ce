"""Reads from a Hugging Face directory what an engine needs without loading its tokenizer."""

from pathlib import Path
from typing import Any

from megadistill.resolve import read_settings


def read_model_config(path: Path) -> dict[str, Any]:
    """The model's `config.json`; raises `ValueError` when `path` has none."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"student.path: found no {file}, expected a Hugging Face directory")
    return read_settings(file)


def eos_token_ids(path: Path) -> list[int]:
    """Every id that ends a response: the model's, its generation settings' and its tokenizer's.

    Raises `ValueError` when there is none, since each response would run into its cap.
    """
    found = _ids(read_model_config(path)) | _ids(read_settings(path / "generation_config.json"))
    settings, tokenizer = (
        read_settings(path / "tokenizer_config.json"),
        read_settings(path / "tokenizer.json"),
    )
    name = settings.get("eos_token")
    text = name["content"] if isinstance(name, dict) else name
    found |= {
        entry["id"] for entry in tokenizer.get("added_tokens", []) if entry["content"] == text
    }
    if not found:
        raise ValueError(f"{path}: found no eos_token_id in config.json or generation_config.json")
    return sorted(found)


def kv_bytes_per_token(model_config: dict[str, Any], bytes_per_value: int) -> int:
    """Bytes that one token takes in the key/value cache, over all layers."""
    heads = model_config["num_attention_heads"]
    kv_heads = model_config.get("num_key_value_heads") or heads
    head_dim = model_config.get("head_dim") or model_config["hidden_size"] // heads
    layers: int = model_config["num_hidden_layers"]
    return 2 * layers * int(kv_heads) * int(head_dim) * bytes_per_value


def _ids(settings: dict[str, Any]) -> set[int]:
    value = settings.get("eos_token_id")
    return set(value) if isinstance(value, list) else set() if value is None else {value}
