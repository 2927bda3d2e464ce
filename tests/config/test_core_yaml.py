"""YAML's traps: what looks like a time or a truth value, keys that stand twice, aliases."""

import math
from pathlib import Path

import pytest
import yaml

from megadistill.config import ConfigError, RunConfig, dump, load, parse
from megadistill.config.core_yaml import read_yaml, write_yaml
from tests.tiny import camopd_tree, make_config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("off", "off"), ("no", "no"), ("Yes", "Yes"), ("true", True), ("False", False)],
        *[("1:30:00", "1:30:00"), ("2026-11-28", "2026-11-28"), ("007", "007"), ("0o17", 15)],
        *[("1e-6", 1e-6), ("2.0e-6", 2e-6), (".5", 0.5), ("-3", -3), ("1_000", "1_000")],
        *[("~", None), ("", None), ("null", None), ("nil", "nil"), (".inf", math.inf)],
        *[("=", "="), ("[a, {b: off}]", ["a", {"b": "off"}]), ("'12'", "12")],
    ],
)
def test_scalars_mean_what_the_core_schema_says(text: str, value: object) -> None:
    found = read_yaml(text)
    assert found == value
    assert type(found) is type(value)
    assert read_yaml(write_yaml(found)) == value


@pytest.mark.parametrize("text", ["off", "1e-6", "1:30", "12", "true", "~", "0o17", "2026-11-28"])
def test_texts_that_any_reader_would_take_for_something_else_are_quoted(text: str) -> None:
    assert yaml.safe_load(write_yaml(text)) == text == read_yaml(write_yaml(text))


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 3\nbatch:\n  size: 4\n  size: 8\n")
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, file)
    message = str(caught.value)
    assert message.startswith(f"{file}: not valid YAML: the key 'size' first stands here")
    assert "line 3, column 3" in message
    assert "line 4, column 3" in message


def test_merged_keys_may_be_said_again() -> None:
    text = "base: &base {a: 1, b: 2}\nmine: {<<: *base, b: 3}\nagain: {<<: *base}\n"
    expected = {"base": {"a": 1, "b": 2}, "mine": {"a": 1, "b": 3}, "again": {"a": 1, "b": 2}}
    assert read_yaml(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &a [*a]", "an alias inside of itself"),
        ("a: &a {b: {c: *a}}", "an alias inside of itself"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + "".join(
                f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n"
                for a, b in zip("abcdef", "bcdefg", strict=True)
            ),
            "more than 100000 values",
        ),
        ("[" * 5000, "nested too deeply"),
    ],
    ids=["itself", "deep inside itself", "bomb", "deep"],
)
def test_aliases_and_depth_are_bounded(text: str, problem: str) -> None:
    with pytest.raises(yaml.YAMLError, match=problem):
        read_yaml(text)


def test_the_documented_words_work_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(camopd_tree()))
    config = load(
        RunConfig, file, ["log.wandb=off", "name=7", "student.path=1234", "log.project=true"]
    )
    assert (config.log.wandb, config.name, config.student.path) == ("off", "7", "1234")
    assert config.log.project == "true"
    assert parse(RunConfig, read_yaml(dump(config))) == config
    for wrong, said in (
        ("cluster.time_minutes=1:30:00", 'found "1:30:00"'),
        ("cluster.time_minutes=24:00:00", 'found "24:00:00"'),
        ("student.path=1.10", "found 1.1"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(RunConfig, file, [wrong])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"cluster": {"time_minutes": 5}}, "cluster.signal_seconds: found 300, expected less than"),
        ({"optimizer": {"warmup_steps": 4}}, "optimizer.warmup_steps: found 4, expected less than"),
        ({"optimizer": {"lr": math.inf}}, "optimizer.lr: found Infinity"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr: found 0"),
        ({"checkpoint": {"every": 5, "export_every": 5}}, "checkpoint.export_every: found 5"),
        *[
            ({"name": name}, "name: found")
            for name in ("../x", "a/b", "%j", "a b", "a\nb", "", ".")
        ],
    ],
)
def test_contradictions_and_names_that_lead_elsewhere_are_refused(
    change: dict[str, object], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(camopd_tree(steps=4) | change)
    assert problem in str(caught.value)
