"""What the distribution says of itself: one version everywhere, a licence, types."""

import re
import tomllib
from pathlib import Path

import yaml

import megadistill

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_in_the_citation_and_heads_the_changes() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == megadistill.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert changes.split("\n## ")[1].startswith(f"{megadistill.__version__} ")


def test_the_licence_is_the_one_that_the_metadata_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert (
        "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()
    )


NEVER = re.compile(
    r"\b(pickle\.loads?|torch\.load|yaml\.(unsafe_|full_)?load\(text\)|os\.system|eval|exec)\(|"
    r"trust_remote_code|shell=True|verify=False"
)
INSIDE_THE_SANDBOX = {"evaluate/benchmarks/livecodebench_driver.py"}


def test_nothing_is_unpickled_or_run_that_the_security_page_says_is_not() -> None:
    package = ROOT / "megadistill"
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if NEVER.search(line.replace("model.eval()", ""))
    }
    assert found == INSIDE_THE_SANDBOX
