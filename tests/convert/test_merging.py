"""Merging against its definition on whole models in dense float64."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megadistill.cli import main
from megadistill.convert import merging
from megadistill.convert.hf_files import SafetensorsReader, writing_model
from megadistill.convert.merging import elected_mean, merge_linear, merge_ties

SHAPES = {"embed.weight": (31, 8), "layer.weight": (16, 8), "norm.weight": (8,)}


def make_tensors(seed: int, spread: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: spread * torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}


def write(directory: Path, tensors: Mapping[str, Tensor]) -> Path:
    directory.mkdir()
    save_file(dict(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def tuned(tmp_path: Path, count: int = 3) -> tuple[Path, list[Path]]:
    """A base, and models that changed it here more and there less."""
    base = make_tensors(0)
    models = []
    for seed in range(1, count + 1):
        change = make_tensors(seed, spread=0.1 * seed)
        changed = {name: base[name] + change[name] for name in base}
        models.append(write(tmp_path / f"tuned-{seed}", changed))
    return write(tmp_path / "base", base), models


def flat(directory: Path) -> Tensor:
    """float64 of the whole model."""
    found = load_file(directory / "model.safetensors")
    return torch.cat([found[name].double().flatten() for name in SHAPES])


def dense_ties(base: Tensor, models: Sequence[Tensor], keep: float, scale: float) -> Tensor:
    """The paper's three steps, over whole vectors."""
    trimmed = []
    for model in models:
        change = model - base
        kept = change.abs().argsort(descending=True)[: round(keep * len(change))]
        trimmed.append(torch.zeros_like(change).index_copy(0, kept, change[kept]))
    merged = torch.zeros_like(base)
    for entry in range(len(base)):
        values = [float(change[entry]) for change in trimmed]
        positive = sum(value for value in values if value > 0)
        negative = -sum(value for value in values if value < 0)
        agreeing = [v for v in values if (v > 0 if positive > negative else v < 0)]
        merged[entry] = sum(agreeing) / max(len(agreeing), 1)
    return base + scale * merged


@pytest.mark.parametrize(("keep", "scale"), [(0.2, 1.0), (0.5, 0.7), (1.0, 0.3), (0.003, 1.0)])
def test_ties_equals_its_definition(tmp_path: Path, keep: float, scale: float) -> None:
    base, models = tuned(tmp_path)
    merge_ties(models, base, tmp_path / "out", keep=keep, scale=scale)
    expected = dense_ties(flat(base), [flat(model) for model in models], keep, scale)
    torch.testing.assert_close(flat(tmp_path / "out"), expected, atol=1e-6, rtol=1e-6)
    assert not torch.equal(flat(tmp_path / "out"), flat(base))


def test_one_tuned_model_with_all_its_changes_is_itself(tmp_path: Path) -> None:
    base, (model,) = tuned(tmp_path, 1)
    merge_ties([model], base, tmp_path / "out", keep=1.0)
    torch.testing.assert_close(flat(tmp_path / "out"), flat(model), atol=1e-6, rtol=0)


def test_the_larger_mass_wins_not_the_larger_number_of_models() -> None:
    changes = torch.tensor([[3.0, 1.0, 0.0, 1.0], [-1.0, 3.0, 0.0, -1.0], [-1.0, 0.0, 0.0, 0.0]])
    assert elected_mean(changes).tolist() == [3.0, 2.0, 0.0, 0.0]


def test_the_mean_is_weighted_in_the_types_of_the_first(tmp_path: Path) -> None:
    first, second = make_tensors(1), make_tensors(2)
    first["layer.weight"] = first["layer.weight"].bfloat16()
    models = [write(tmp_path / "a", first), write(tmp_path / "b", second)]
    merge_linear(models, tmp_path / "out", [3.0, 1.0])
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        expected = 0.75 * first[name].double() + 0.25 * second[name].double()
        assert torch.equal(found[name], expected.to(first[name].dtype))
    merge_linear(models, tmp_path / "equal")
    found = load_file(tmp_path / "equal" / "model.safetensors")
    half = (first["norm.weight"].double() + second["norm.weight"].double()) / 2
    assert torch.equal(found["norm.weight"], half.float())


def test_models_in_several_files_merge_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In other orders and shards, a tensor in several blocks."""
    monkeypatch.setattr(merging, "BLOCK", 50)
    base, models = tuned(tmp_path, 2)
    shards = []
    for index, model in enumerate(models):
        tensors = load_file(model / "model.safetensors")
        with writing_model(tmp_path / f"shards-{index}", max_shard_bytes=600) as writer:
            for name in sorted(tensors, reverse=bool(index)):
                writer.write(name, tensors[name])
            writer.copy_metadata(model)
        shards.append(str(tmp_path / f"shards-{index}"))
        assert len(list((tmp_path / f"shards-{index}").glob("*.safetensors"))) > 1
    words = ["convert", "merge", *shards, str(tmp_path / "out"), "--model", str(base)]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--keep", "0.5", "--scale", "0.5"])
    assert ended.value.code == 0
    expected = dense_ties(flat(base), [flat(model) for model in models], 0.5, 0.5)
    torch.testing.assert_close(flat(tmp_path / "out"), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(SystemExit) as ended:
        main(["convert", "merge", *shards, str(tmp_path / "mean")])
    assert ended.value.code == 0
    mean = (flat(models[0]) + flat(models[1])) / 2
    torch.testing.assert_close(flat(tmp_path / "mean"), mean, atol=1e-6, rtol=0)
    assert set(SafetensorsReader(tmp_path / "mean").names) == set(SHAPES)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    first = write(tmp_path / "first", make_tensors(1))
    tall = write(tmp_path / "tall", {**make_tensors(2), "layer.weight": torch.ones(17, 8)})
    more = write(tmp_path / "more", {**make_tensors(2), "lm_head.weight": torch.ones(2)})
    out = tmp_path / "out"
    dot = write(tmp_path / "dot", {**make_tensors(2), "norm.weight": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"^norm\.weight: found \(\) in .*dot, expected \(8,\)"):
        merge_linear([first, dot], out)
    with pytest.raises(ValueError, match=r"^layer\.weight: found \(17, 8\) in .*tall, expected"):
        merge_linear([first, tall], out)
    with pytest.raises(
        ValueError, match=r"^lm_head\.weight: found \(2,\) in .*more, expected none"
    ):
        merge_ties([first, more], first, out)
    with pytest.raises(ValueError, match=r"^lm_head\.weight: found no such tensor in .*first"):
        merge_ties([first], more, out)
    for weights in ([1.0], [1.0, -1.0], [1.0, float("nan")], [1e308, 1e308]):
        with pytest.raises(ValueError, match="weight: found"):
            merge_linear([first, first], out, weights)
    for wrong in ({"keep": 0.0}, {"keep": 1.1}, {"scale": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: found"):
            merge_ties([first, first], first, out, **wrong)
    with pytest.raises(ValueError, match="found 1 model, expected at least two"):
        merge_linear([first], out)
    assert not out.exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_merged(tmp_path: Path, number: float) -> None:
    base, (good, bad) = tuned(tmp_path, 2)
    tensors = load_file(bad / "model.safetensors")
    tensors["layer.weight"][3, 2] = number
    broken = write(tmp_path / "broken", tensors)
    out = tmp_path / "out"
    named = r"^layer\.weight: found NaN or infinity in .*broken, expected numbers$"
    with pytest.raises(ValueError, match=named):
        merge_linear([good, broken], out)
    with pytest.raises(ValueError, match=named):
        merge_ties([good, broken], base, out)
    with pytest.raises(ValueError, match=named):
        merge_ties([good, bad], broken, out)
    assert not out.exists()


def test_a_sum_that_the_type_does_not_hold_is_not_written(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"norm.weight": torch.zeros(8).half()})
    model = write(tmp_path / "model", {"norm.weight": torch.full((8,), 6e4).half()})
    with pytest.raises(ValueError, match=r"^norm\.weight: found NaN or infinity in the merged"):
        merge_ties([model], base, tmp_path / "out", keep=1.0, scale=2.0)
    assert not (tmp_path / "out").exists()


def test_models_of_equal_shapes_that_compute_otherwise_are_not_merged(tmp_path: Path) -> None:
    models = [write(tmp_path / name, make_tensors(1)) for name in ("first", "second")]
    settings = models[1] / "config.json"
    out = tmp_path / "out"
    for key, value, expected in [
        ("model_type", "qwen2", "llama"),
        ("num_attention_heads", 4, 2),
        ("num_key_value_heads", 4, 2),
    ]:
        own = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2}
        (models[0] / "config.json").write_text(json.dumps(own))
        settings.write_text(json.dumps({"model_type": "llama"} | {key: value}))
        with pytest.raises(ValueError, match=f"{key}: found {value!r}, expected {expected!r}"):
            merge_linear(models, out)
    for text, message in [("[]", "expected a JSON object"), ("{nope", "not valid JSON")]:
        settings.write_text(text)
        with pytest.raises(ValueError, match=rf"second/config\.json: .*{message}"):
            merge_linear(models, out)
    settings.unlink()
    with pytest.raises(ValueError, match=r"second/config\.json: no such file"):
        merge_linear(models, out)
    assert not out.exists()


def test_a_type_that_is_not_written_is_named(tmp_path: Path) -> None:
    tensors = {"norm.weight": torch.ones(8).to(torch.float8_e5m2)}
    models = [write(tmp_path / name, tensors) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"^norm\.weight: found the type torch\.float8_e5m2"):
        merge_linear(models, tmp_path / "out")


@pytest.mark.parametrize("option", ["--keep", "--scale"])
def test_what_only_ties_reads_needs_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    model = str(write(tmp_path / "a", make_tensors(1)))
    with pytest.raises(SystemExit) as ended:
        main(["convert", "merge", model, model, str(tmp_path / "out"), option, "0.5"])
    assert ended.value.code == 2
    assert f"{option}: found it without --model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ties_takes_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write(tmp_path / "a", make_tensors(1)))
    words = ["convert", "merge", model, model, str(tmp_path / "out"), "--model", model]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--weight", "1"])
    assert ended.value.code == 2
    assert "--weight: found it beside --model" in capsys.readouterr().err
