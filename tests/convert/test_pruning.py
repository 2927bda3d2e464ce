"""FAPM by hand, and on a whole model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadistill.cli import main
from megadistill.convert.pruning import prune_change, pruned


def test_changes_of_large_weights_are_kept_first() -> None:
    base = torch.tensor([[4.0, 1.0], [-2.0, 1.0]])
    tuned = base + torch.tensor([[0.4, -0.4], [0.4, 0.1]])
    # mean|W| = 2; S = 0.4 - 2*0.4/4 = 0.2, 0.4 - 2*0.4/1 = -0.4, 0.4 - 0.4 = 0, 0.1 - 0.2 = -0.1
    assert torch.equal(pruned(tuned, base, 0.25), torch.tensor([[4.4, 1.0], [-2.0, 1.0]]))
    assert torch.equal(pruned(tuned, base, 0.5), torch.tensor([[4.4, 1.0], [-1.6, 1.0]]))
    assert torch.equal(pruned(tuned, base, 0.75), torch.tensor([[4.4, 1.0], [-1.6, 1.1]]))
    assert torch.equal(pruned(tuned, base, 1.0), tuned)


def test_a_weight_of_zero_is_restored_before_others() -> None:
    base = torch.tensor([[0.0, 1.0]])
    found = pruned(base + 0.5, base, 0.5)
    assert torch.equal(found, torch.tensor([[0.0, 1.5]]))


def write(directory: Path, matrix: torch.Tensor, **more: torch.Tensor) -> Path:
    directory.mkdir()
    tensors = {"layer.weight": matrix, "norm.weight": matrix[0].clone(), **more}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def test_a_model_is_pruned_by_one_command(tmp_path: Path) -> None:
    matrix = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    base = write(tmp_path / "base", matrix)
    tuned = write(tmp_path / "tuned", matrix + 0.125)
    words = ["convert", "fapm", str(tuned), str(tmp_path / "out"), "--model", str(base)]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--keep", "0.25"])
    assert ended.value.code == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    changed = found["layer.weight"] != matrix
    assert changed.sum() == matrix.numel() // 4
    assert found["layer.weight"].dtype == torch.bfloat16
    assert torch.equal(found["norm.weight"], matrix[0] + 0.125)


def test_what_is_no_number_is_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good", torch.ones(2, 2))
    bad = write(tmp_path / "bad", torch.tensor([[1.0, float("nan")], [1.0, 1.0]]))
    for tuned, base in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=r"NaN or infinity in .*bad, expected numbers"):
            prune_change(tuned, base, tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


def test_models_must_match(tmp_path: Path) -> None:
    base = write(tmp_path / "base", torch.ones(2, 2))
    more = write(tmp_path / "more", torch.ones(2, 2), extra=torch.ones(2))
    with pytest.raises(ValueError, match=r"1 tensors are in one only, e\.g\. extra"):
        prune_change(more, base, tmp_path / "out", 0.1)
    with pytest.raises(ValueError, match=r"layer\.weight: found \(3, 2\)"):
        prune_change(write(tmp_path / "tall", torch.ones(3, 2)), base, tmp_path / "out", 0.1)
    with pytest.raises(ValueError, match="keep: found 0"):
        prune_change(base, base, tmp_path / "out", 0.0)
    assert not (tmp_path / "out").exists()
