import json
from pathlib import Path

import pytest

from megadistill.rollout.model_files import eos_token_ids, kv_bytes_per_token, read_model_config
from tests.tiny import write_model_config


def test_end_of_sequence_ids_come_from_every_file_that_names_one(tmp_path: Path) -> None:
    write_model_config(tmp_path, eos_token_id=2)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    added = [{"id": 9, "content": "<|im_end|>"}, {"id": 5, "content": "<unk>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert eos_token_ids(tmp_path) == [2, 7, 9]


def test_a_tokenizer_may_describe_its_end_of_sequence_token_as_a_mapping(tmp_path: Path) -> None:
    write_model_config(tmp_path)
    settings = {"eos_token": {"content": "</s>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    added = {"added_tokens": [{"id": 3, "content": "</s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(added))
    assert eos_token_ids(tmp_path) == [3]


def test_a_model_without_end_of_sequence_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no eos_token_id"):
        eos_token_ids(write_model_config(tmp_path))


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student\.path: found no .*config\.json"):
        read_model_config(tmp_path)


def test_cache_bytes_per_token_count_keys_and_values_of_every_layer(tmp_path: Path) -> None:
    config = read_model_config(write_model_config(tmp_path))
    # 4 layers, keys and values, 2 heads of 32 / 4 numbers, 2 bytes each
    assert kv_bytes_per_token(config, 2) == 4 * 2 * 2 * 8 * 2
