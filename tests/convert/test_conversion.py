import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megadistill.convert.checkpoint import CheckpointReader
from megadistill.convert.conversion import hf_to_megatron, megatron_to_hf
from tests.convert.conftest import assert_same, read_all

TOOLS = Path(__file__).parents[2] / "tools"


def run_tool(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a tool run in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_there_and_back_is_bit_identical(model_dir: Path, tmp_path: Path) -> None:
    hf_to_megatron(model_dir, tmp_path / "megatron", max_file_bytes=30_000, progress=False)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", max_shard_bytes=30_000, progress=False)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert_same(read_all(tmp_path / "hf"), read_all(model_dir))
    settings = [json.loads((d / "config.json").read_text()) for d in (model_dir, tmp_path / "hf")]
    assert settings[0] == settings[1]


def test_no_bit_is_lost_where_parts_of_one_tensor_have_several_dtypes(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """One projection of one layer in fp32: its fused tensor, and the stack of layers, hold all of it."""
    source = shutil.copytree(models["qwen2-untied"], tmp_path / "mixed")
    tensors = read_all(source)
    wide = [
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.2.self_attn.k_proj.bias",
        "model.layers.1.mlp.up_proj.weight",
    ]
    for name in wide:
        tensors[name] = torch.randn(tensors[name].shape)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(source, tmp_path / "megatron", progress=False)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", progress=False)
    found = read_all(tmp_path / "hf")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].float(), tensor.float()), name
    widened = {name for name in found if found[name].dtype == torch.float32}
    parts = [f"self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")]
    parts += ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    assert widened == {f"model.layers.{layer}.{part}" for layer in range(4) for part in parts}


def test_transformers_loads_the_result(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = models["qwen3-tied"]
    hf_to_megatron(source, tmp_path / "megatron", progress=False)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", max_shard_bytes=9_000, progress=False)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
    assert_same(found, expected)


def test_the_tools_convert(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, checkpoint, back = models["qwen2-tied"], tmp_path / "megatron", tmp_path / "hf"
    assert run_tool("hf_to_megatron.py", source, checkpoint, monkeypatch=monkeypatch) == 0
    shutil.rmtree(checkpoint / "hf")
    arguments = (checkpoint, back, "--model", source, "--max-file-gb", 1e-5)
    assert run_tool("megatron_to_hf.py", *arguments, monkeypatch=monkeypatch) == 0
    assert len(list(back.glob("*.safetensors"))) > 1
    assert capsys.readouterr().out.splitlines()[-1] == str(back)
    assert_same(read_all(back), read_all(source))


def test_the_tools_end_with_the_reason(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (models["qwen2-tied"], tmp_path)
    (tmp_path / "something").touch()
    assert run_tool("hf_to_megatron.py", *arguments, monkeypatch=monkeypatch) == 2
    assert f"{tmp_path}: already exists; delete it or" in capsys.readouterr().err


def test_a_failed_conversion_leaves_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models["llama-tied"], broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 50}))
    with pytest.raises(ValueError, match=r"found \(96, 32\) together, expected \(100, 32\)"):
        hf_to_megatron(broken, tmp_path / "megatron", progress=False)
    hf_to_megatron(models["llama-tied"], tmp_path / "good", progress=False)
    with pytest.raises(ValueError, match=r"found \(96, 32\), expected \(100, 32\) by config"):
        megatron_to_hf(tmp_path / "good", tmp_path / "hf", model=broken, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"broken", "good"}


def test_a_checkpoint_without_configuration_needs_a_model(
    models: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = hf_to_megatron(models["llama-tied"], tmp_path / "megatron", progress=False)
    shutil.rmtree(checkpoint / "hf")
    with pytest.raises(ValueError, match="name the Hugging Face model that it was trained from"):
        megatron_to_hf(checkpoint, tmp_path / "hf", progress=False)


def test_a_checkpoint_of_another_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(models["llama-tied"], tmp_path / "megatron", progress=False)
    with pytest.raises(ValueError, match=r"no parameter .*linear_qkv.bias among"):
        megatron_to_hf(checkpoint, tmp_path / "hf", model=models["qwen2-tied"], progress=False)
    assert CheckpointReader(checkpoint).read("decoder.final_layernorm.weight").shape == (32,)
