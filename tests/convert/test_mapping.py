import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from megadistill.convert.families import ModelSpec, parse_spec, read_spec
from megadistill.convert.mapping import (
    GateUp,
    QueryKeyValue,
    Vocabulary,
    check_names,
    entries,
    find_entry,
    hf_names,
    load_shard,
    outer_entries,
    to_hf,
)
from tests.convert.conftest import assert_same, read_all, reads
from tests.convert.test_families import config

Shards = dict[str, torch.Tensor]


def stages(spec: ModelSpec, pp: int) -> list[range]:
    size = spec.num_layers // pp
    return [range(stage * size, (stage + 1) * size) for stage in range(pp)]


def shards(spec: ModelSpec, tensors: Shards, *, tp: int, pp: int) -> dict[tuple[int, int], Shards]:
    """Every rank's parameters under their local names, by (tp rank, pp rank)."""
    return {
        (rank, stage): dict(
            load_shard(
                spec,
                reads(tensors),
                tp=tp,
                tp_rank=rank,
                layers=layers,
                first=stage == 0,
                last=stage == pp - 1,
            )
        )
        for rank in range(tp)
        for stage, layers in enumerate(stages(spec, pp))
    }


def global_name(name: str, first_layer: int) -> str:
    if not name.startswith("decoder.layers."):
        return name
    _, _, number, rest = name.split(".", 3)
    return f"decoder.layers.{int(number) + first_layer}.{rest}"


@pytest.mark.parametrize(("tp", "pp"), [*itertools.product((1, 2), (1, 2))])
def test_shards_gather_to_the_same_bits(model_dir: Path, tp: int, pp: int) -> None:
    spec, tensors = read_spec(model_dir), read_all(model_dir)
    ranks = shards(spec, tensors, tp=tp, pp=pp)
    gathered: Shards = {}
    for stage, layers in enumerate(stages(spec, pp)):
        for local in ranks[0, stage]:
            name = global_name(local, layers.start)
            if name == "output_layer.weight" and spec.tied_embeddings:
                continue
            pieces = [ranks[rank, stage][local] for rank in range(tp)]
            full = find_entry(spec, name).layout.unshard(pieces)
            gathered.update(to_hf(spec, name, full))
    assert_same(gathered, tensors)


def test_a_tied_last_stage_gets_the_embedding(models: dict[str, Path]) -> None:
    spec, tensors = read_spec(models["llama-tied"]), read_all(models["llama-tied"])
    ranks = shards(spec, tensors, tp=2, pp=2)
    for rank in range(2):
        embedding = ranks[rank, 0]["embedding.word_embeddings.weight"]
        assert torch.equal(ranks[rank, 1]["output_layer.weight"], embedding)
    alone = shards(spec, tensors, tp=1, pp=1)[0, 0]
    assert "output_layer.weight" not in alone
    assert not list(to_hf(spec, "output_layer.weight", tensors["model.embed_tokens.weight"]))


def test_layers_are_numbered_from_zero_in_every_stage(models: dict[str, Path]) -> None:
    spec, tensors = read_spec(models["qwen3-tied"]), read_all(models["qwen3-tied"])
    last = shards(spec, tensors, tp=1, pp=2)[0, 1]
    name = "self_attention.q_layernorm.weight"
    expected = tensors["model.layers.3.self_attn.q_norm.weight"]
    assert torch.equal(last[f"decoder.layers.1.{name}"], expected)
    assert f"decoder.layers.2.{name}" not in last


def test_queries_stand_before_the_key_and_value_they_share() -> None:
    spec = parse_spec(config(hidden_size=2, head_dim=1))  # 4 heads, 2 of them a kv head
    query, key, value = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    layout = QueryKeyValue()
    full = layout.merge(spec, [query, key, value])
    assert full.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert layout.shard(full, 2, 1).tolist() == [2, 3, 11, 21]
    for part, expected in zip(layout.split(spec, full), (query, key, value), strict=True):
        assert torch.equal(part, expected)


def test_gate_and_up_are_cut_separately() -> None:
    full = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    pieces = [GateUp().shard(full, 2, rank) for rank in range(2)]
    assert [piece.tolist() for piece in pieces] == [[0, 1, 10, 11], [2, 3, 12, 13]]
    assert torch.equal(GateUp().unshard(pieces), full)


def test_vocabulary_padding_is_zero_and_dropped() -> None:
    spec = dataclasses.replace(parse_spec(config()), vocab_size=3)
    full = torch.ones(3, 2, dtype=torch.bfloat16)
    pieces = [Vocabulary().shard(full, 5, rank) for rank in range(5)]
    assert [float(piece.sum()) for piece in pieces] == [2, 2, 2, 0, 0]
    assert {(tuple(piece.shape), piece.dtype) for piece in pieces} == {((1, 2), torch.bfloat16)}
    (kept,) = Vocabulary().split(spec, Vocabulary().unshard(pieces))
    assert torch.equal(kept, full)


def test_the_table_has_the_names_of_transformers(model_dir: Path) -> None:
    spec = read_spec(model_dir)
    assert set(hf_names(spec)) == set(read_all(model_dir))
    check_names(spec, hf_names(spec))
    check_names(spec, [*hf_names(spec), "model.layers.0.self_attn.rotary_emb.inv_freq"])


def test_missing_and_unexpected_tensors_are_named(models: dict[str, Path]) -> None:
    spec = read_spec(models["llama-untied"])
    names = [name for name in hf_names(spec) if name != "lm_head.weight"]
    with pytest.raises(ValueError, match=r"1 missing \['lm_head.weight'\], 1 unexpected \['x'\]"):
        check_names(spec, [*names, "x"])


def test_a_tensor_of_another_shape_is_refused(models: dict[str, Path]) -> None:
    spec, tensors = read_spec(models["llama-tied"]), read_all(models["llama-tied"])
    tensors["model.embed_tokens.weight"] = torch.zeros(50, 32)
    with pytest.raises(ValueError, match=r"embed_tokens.weight: found \(50, 32\) together"):
        shards(spec, tensors, tp=1, pp=1)


def test_ranks_that_do_not_divide_the_model_are_refused(models: dict[str, Path]) -> None:
    spec = read_spec(models["llama-tied"])
    with pytest.raises(ValueError, match="tp: found 4"):
        shards(spec, {}, tp=4, pp=1)


def test_unknown_parameters_are_refused() -> None:
    spec = parse_spec(config())
    for name in ("decoder.layers.4.mlp.linear_fc2.weight", "decoder.layers.0.x", "x"):
        with pytest.raises(ValueError, match="no such parameter in a llama model of 4 layers"):
            find_entry(spec, name)
    assert [entry.megatron for entry in outer_entries(spec)][-1] == "output_layer.weight"


def test_the_number_of_parameters_is_that_of_the_tensors(model_dir: Path) -> None:
    spec = read_spec(model_dir)
    numbers = [torch.Size(entry.shape(spec)).numel() for entry in entries(spec)]
    assert spec.num_parameters == sum(numbers)
