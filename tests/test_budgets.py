"""Limits of size, so that a module that grows too large is noticed when it does."""

from pathlib import Path

import pytest

import megadistill

PACKAGE = Path(megadistill.__file__).parent
MOST_LINES = 400


@pytest.mark.parametrize(
    "module", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_a_module_fits_its_budget(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_there_are_modules_to_measure() -> None:
    assert (PACKAGE / "train.py").exists()
