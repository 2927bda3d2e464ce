import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megadistill.convert.families import (
    ModelSpec,
    RopeScaling,
    check_tp,
    padded_vocab,
    parse_spec,
    read_spec,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 51,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    return {**settings, **changes}


def test_every_number_is_read() -> None:
    assert parse_spec(config(tie_word_embeddings=True)) == ModelSpec(
        family="llama",
        num_layers=4,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_size=48,
        vocab_size=51,
        max_positions=64,
        rms_norm_eps=1e-5,
        tied_embeddings=True,
        qkv_bias=False,
        qk_norm=False,
        rope_theta=500000.0,
    )


def test_families_differ_in_bias_norm_and_head_size() -> None:
    found = [parse_spec(config(model_type=name)) for name in ("llama", "qwen2", "qwen3")]
    assert [(s.qkv_bias, s.qk_norm, s.head_dim) for s in found] == [
        (False, False, 8),
        (True, False, 8),
        (False, True, 128),
    ]
    assert parse_spec(config(model_type="qwen3", head_dim=16)).head_dim == 16


def test_specs_of_saved_models_agree_with_transformers(model_dir: Path) -> None:
    from transformers import AutoConfig

    spec, theirs = read_spec(model_dir), AutoConfig.from_pretrained(model_dir)
    assert spec.family == theirs.model_type
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    assert spec.rope_theta == theirs.rope_parameters["rope_theta"]
    assert spec.rms_norm_eps == theirs.rms_norm_eps


def test_rope_settings_are_read_in_both_forms() -> None:
    old = parse_spec(config(rope_scaling=LLAMA3_ROPE))
    plain = config()
    del plain["rope_theta"]
    new = parse_spec({**plain, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}})
    assert old == new
    assert old.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    assert parse_spec(config(rope_scaling=None)).rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type: found 'gemma', expected one of"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
        ({"mlp_bias": True}, "mlp_bias: found True, expected False"),
        ({"attention_bias": True}, "attention_bias: found True, expected False"),
        ({"vocab_size": None}, "vocab_size: found None, expected a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: found 3, expected a divisor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: found"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type: found 'yarn', expected 'default' or 'llama3'",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_parameters.low_freq_factor: found None, expected a number",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "found separate settings for",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: found"),
        (
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2},
            "sliding_window: found 4096 for layers from 2",
        ),
        ({"sliding_window": 4096}, "sliding_window: found 4096 for layers from 0"),
    ],
)
def test_unsupported_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_spec(config(**changes))


def test_all_problems_come_in_one_error() -> None:
    with pytest.raises(ValueError, match=r"mlp_bias.*; .*yarn"):
        parse_spec(config(mlp_bias=True, rope_scaling={"rope_type": "yarn"}))


def test_sliding_windows_that_no_layer_uses_are_fine() -> None:
    parse_spec(config(use_sliding_window=False, sliding_window=4096, max_window_layers=0))
    parse_spec(config(use_sliding_window=True, sliding_window=4096, max_window_layers=4))
    parse_spec(config(layer_types=["full_attention"] * 4))


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file, expected a Hugging Face model directory"):
        read_spec(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_spec(tmp_path)
    file.write_text(json.dumps(config(mlp_bias=True)))
    with pytest.raises(ValueError, match=f"{file}: mlp_bias"):
        read_spec(tmp_path)


def test_the_vocabulary_is_padded_to_the_ranks() -> None:
    spec = parse_spec(config())
    assert [padded_vocab(spec, tp) for tp in (1, 2, 3, 4)] == [51, 52, 51, 52]


def test_ranks_must_share_heads_and_feed_forward_rows() -> None:
    spec = parse_spec(config())
    check_tp(spec, 2)
    with pytest.raises(ValueError, match="tp: found 4, expected a divisor of num_key_value_heads"):
        check_tp(spec, 4)
    with pytest.raises(ValueError, match="tp: found 2, expected a divisor of intermediate_size"):
        check_tp(dataclasses.replace(spec, ffn_size=49), 2)
