"""The Python example of the documentation, run as it stands."""

import sys
from pathlib import Path

import pytest

from tests.e2e.small_run import finish, make_models, start, write_run

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "own_run.py"

pytestmark = [pytest.mark.vllm, pytest.mark.megatron, pytest.mark.multi, pytest.mark.slow]


@pytest.mark.timeout(600)
def test_the_python_example_trains_and_reads_its_metrics(tmp_path: Path) -> None:
    make_models(tmp_path)
    config = write_run(tmp_path, "own", evaluate={"every": 0})
    output = finish(start([sys.executable, str(EXAMPLE), str(config), "steps=1"]))
    assert "1 trainer rank(s), 1 engine(s), 1 node(s)" in output  # planned, before it ran
    assert "step 1: general, loss " in output
    assert (tmp_path / "runs" / "own" / "export" / "model.safetensors").exists()
