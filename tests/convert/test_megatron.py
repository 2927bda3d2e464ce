from pathlib import Path

import pytest

from megadistill.config.schema import ParallelConfig
from megadistill.convert.conversion import hf_to_megatron, megatron_to_hf
from tests.convert.conftest import assert_same, read_all

LAYOUTS = {"tp2": ParallelConfig(tp=2), "pp2": ParallelConfig(pp=2)}
MODELS = ("llama-tied", "qwen2-untied", "qwen3-untied")


@pytest.mark.megatron
@pytest.mark.multi
def test_megatron_loads_and_saves_what_we_convert(models: dict[str, Path], tmp_path: Path) -> None:
    from tests.convert.megatron_world import load_everywhere
    from tests.megatron.worlds import run_world

    pairs = [
        (models[name], hf_to_megatron(models[name], tmp_path / "ours" / name, progress=False))
        for name in MODELS
    ]
    assert run_world(load_everywhere, 2, LAYOUTS, pairs, tmp_path / "theirs") == []
    for name in MODELS:
        back = tmp_path / "back" / name
        megatron_to_hf(tmp_path / "theirs" / name, back, model=models[name], progress=False)
        assert_same(read_all(back), read_all(models[name]))
