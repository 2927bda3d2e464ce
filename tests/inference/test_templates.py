"""Template files."""

from pathlib import Path

import pytest

from megadistill.inference import templates
from megadistill.inference.templates import load_template


def test_values_are_put_in_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("=== system ===\nBe {brief}.\n=== user ===\n{question}: {answer}\n")
    template = load_template(str(file), ("question", "answer"))
    filled = template.fill({"question": "{answer}", "answer": r"\1 {question} %s"})
    assert [turn["content"] for turn in filled] == ["Be {brief}.", r"{answer}: \1 {question} %s"]
    assert [turn["role"] for turn in filled] == ["system", "user"]
    before = template.hash
    file.write_text(file.read_text() + " ")
    assert load_template(str(file), ("question",)).hash != before


def test_mistakes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("{question}")
    with pytest.raises(ValueError, match="found no line `=== user ===`"):
        load_template(str(file), ("question",))
    file.write_text("=== user ===\n{question}")
    with pytest.raises(ValueError, match=r"found no \{answer\}, expected question, answer"):
        load_template(str(file), ("question", "answer"))


@pytest.mark.parametrize("name", ["rewrite-v1", "rewrite-maths-v1", "fuse-v1", "judge-v1"])
def test_packaged_templates_are_whole(name: str) -> None:
    names = {
        "fuse": ("question", "answer", "rewrite"),
        "judge": ("question", "answer", "candidate"),
    }
    needed = names.get(name.partition("-")[0], ("question", "answer"))
    template = load_template(f"packaged:{name}", needed)
    assert template.name == name
    assert len(template.hash) == 16
    files = (Path(templates.__file__).parent / "templates").glob("*.txt")
    assert name in {file.stem for file in files}
