"""The command line: help without heavy imports, one message and code 2 for a user's mistake."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megadistill.cli import main
from megadistill.cli.verbs import Verb, check_words
from megadistill.config import RunConfig, parse
from megadistill.rundir import RunDir
from tests.tiny import Tree, camopd_tree, make_config, write_model, write_model_config

FAMILIES = {
    "campaign": ["submit", "status", "cancel", "resume"],
    "eval": ["run", "compare"],
    "config": ["show", "check", "schema"],
    "recipes": ["list", "copy"],
    "convert": ["megatron", "hf", "fapm", "merge"],
}
VERBS = [
    *("train", "node", "submit", "status", "report", "probe", "doctor", "shard"),
    *("prepare", "refine", "prepare-model"),
    *FAMILIES,
]
LINES = [[name] for name in VERBS] + [[name, verb] for name in FAMILIES for verb in FAMILIES[name]]


def run_cli(*arguments: str) -> int:
    """The exit code of a command run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def write(file: Path, tree: Tree) -> str:
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("verb", LINES, ids=" ".join)
def test_every_verb_has_help_with_an_example_that_can_be_read(
    verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*verb, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: megadistill {' '.join(verb)} ")
    _, what, *_ = text.split("\n\n")
    assert what.endswith(".")
    example = text.split("Example: megadistill ")[1].split("    (")[0].split()
    assert example[: len(verb)] == verb
    check_words("example", example)


@pytest.mark.parametrize("family", ["", *FAMILIES])
def test_the_list_of_verbs_is_complete(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*family.split(), "--help") == 0
    listed = re.findall(r"^  ([a-z-]+)  ", capsys.readouterr().out.split("Commands:")[1], re.M)
    assert sorted(listed) == sorted(FAMILIES.get(family, VERBS))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("campaign CONFIG --local k=v", "campaign submit CONFIG --local k=v"),
        ("campaign --local CONFIG", "campaign submit --local CONFIG"),
        ("eval CONFIG k=v", "eval run CONFIG k=v"),
        ("eval --compare --output DIR a b", "eval compare --output DIR a b"),
        ("eval a b --compare --confidence 0.9", "eval compare a b --confidence 0.9"),
    ],
)
def test_earlier_spellings_mean_the_same(
    before: str, now: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, Tree]] = []
    monkeypatch.setattr(
        Verb, "invoke", lambda _, ctx: called.append((ctx.command_path, ctx.params))
    )
    for line in (before, now):
        assert run_cli(*line.split()) == 0
    assert called[0] == called[1]


def test_a_command_line_is_read_without_running_it() -> None:
    check_words("key", ["train", "nowhere.yaml", "steps=3"])
    check_words("key", ["eval", "--compare", "a"])
    for words, said in {
        ("train",): "Missing argument 'CONFIG'",
        ("trian", "a"): "No such command 'trian'. Did you mean 'train'?",
        ("probe", "a", "--samples", "few"): "Invalid value for '--samples'",
        ("report", "a", "--page"): "'--page' requires an argument",
    }.items():
        with pytest.raises(ValueError, match=r"^key: ") as caught:
            check_words("key", words)
        assert said in str(caught.value)


def test_completion_knows_verbs_and_kinds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_MEGADISTILL_COMPLETE", "complete_bash")
    for line, word, expected in (
        ("megadistill campaign ", "2", "submit\nresume\nstatus\ncancel"),
        ("megadistill config schema --kind re", "4", "refine"),
    ):
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", word)
        assert run_cli() == 0
        assert capsys.readouterr().out.strip() == expected


def test_help_needs_no_machine_learning_library() -> None:
    code = (
        "import sys\n"
        "from megadistill.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'megatron', 'vllm'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megadistill", "status", "nowhere"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "megadistill: nowhere: found no config.yaml, expected a run directory\n"


@pytest.mark.parametrize("verb", [["train"], ["config", "show"], ["submit", "train"]], ids=" ".join)
def test_a_wrong_configuration_is_one_message_and_code_two(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "run.yaml", camopd_tree(steps="soon", bogus=1))
    assert run_cli(*verb, config) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert lines[0] == f"megadistill: {config}: {len(lines) - 1} problem(s)"
    assert [line.split(":")[0].strip() for line in lines[1:3]] == ["steps", "bogus"]


@pytest.mark.parametrize("verb", [["train"], ["submit", "train"]], ids=" ".join)
def test_missing_models_are_found_before_anything_starts(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "run.yaml", camopd_tree(runs_dir=str(tmp_path / "runs")))
    assert run_cli(*verb, config) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"megadistill: {config}: 3 problem(s)"
    assert all(line.endswith("which does not exist") for line in lines[1:])
    assert not (tmp_path / "runs").exists()


def test_work_on_exports_that_could_not_be_read_is_found_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = camopd_tree(checkpoint={"on_export": {"verb": "evaluate", "config": "eval.yaml"}})
    assert run_cli("train", write(tmp_path / "run.yaml", tree)) == 2
    assert "\n  checkpoint.on_export: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["train"], ["submit", "dance", "x"], ["convert", "jax", "a", "b"]]
)
def test_a_wrong_command_line_is_code_two_with_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*arguments) == 2
    said = capsys.readouterr().err
    assert "Usage: megadistill" in said
    assert not re.search("[\u2500-\u257f]|Traceback", said)  # no boxes drawn


def test_config_show_prints_what_would_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "run.yaml", camopd_tree())
    assert run_cli("config", "show", config, "steps=9", "optimizer.lr=1e-5") == 0
    shown = parse(RunConfig, yaml.safe_load(capsys.readouterr().out))
    assert shown == parse(RunConfig, camopd_tree(steps=9, optimizer={"lr": 1e-5}))


def test_config_check_counts_valid_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good.yaml", camopd_tree())
    assert run_cli("config", "check", good, good) == 0
    assert capsys.readouterr().out == "2 of 2 files are valid\n"


def test_config_check_reports_every_problem_of_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good.yaml", camopd_tree())
    bad = write(tmp_path / "bad.yaml", camopd_tree(steps=0, seed="x"))
    assert run_cli("config", "check", bad, good, str(tmp_path / "gone.yaml")) == 1
    printed = capsys.readouterr()
    assert printed.out == "1 of 3 files are valid\n"
    assert f"{bad}: 2 problem(s)" in printed.err
    assert "  steps: found 0" in printed.err
    assert '  seed: found "x"' in printed.err
    assert "gone.yaml: no such file" in printed.err


def test_config_check_finds_a_layout_that_no_nodes_could_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = camopd_tree(parallel={"tp": 3}, device="auto", cluster={"nodes": 2, "gpus_per_node": 8})
    tree["rollout"] = {"max_tokens": 16, "placement": "dedicated"}
    tree["cluster"]["rollout_nodes"] = 1
    file = tmp_path / "uneven.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert run_cli("config", "check", str(file)) == 1
    said = capsys.readouterr().err
    assert f"{file}: 1 problem(s)\n  parallel: found tp 3 x pp 1 x cp 1 = 3" in said


def keys_of(said: str) -> list[str]:
    """The dotted keys of a report, each once, after its line that counts."""
    count, *lines = said.splitlines()
    assert count.endswith(f": {len(lines)} problem(s)")
    return list(dict.fromkeys(line.split(": ")[0].strip() for line in lines))


def test_a_report_has_every_wrong_key_and_then_all_that_the_right_ones_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"path": str(write_model(tmp_path / "model"))}
    nowhere = {"path": str(tmp_path / "nowhere")}
    tree = camopd_tree(
        student=model,
        teachers={"general": model, "domain": nowhere},
        batch={"sise": 3},
        device="auto",
        parallel={"tp": 3, "dp": 9},
        evaluate={"every": "ten"},
        checkpoint={"every": 2, "export_every": 3},
        steps="many",
    )
    tree["rollout"]["max_tokens"] = "12k"
    file = write(tmp_path / "run.yaml", tree)
    assert run_cli("train", file) == 2
    assert keys_of(capsys.readouterr().err) == [
        *("steps", "batch.sise", "rollout.max_tokens", "evaluate.every"),
        "checkpoint.export_every",
    ]
    tree |= {"steps": 4, "batch": {"size": 3}, "rollout": {"max_tokens": 16}}
    tree |= {"evaluate": {}, "checkpoint": {}, "cluster": {"gpus_per_node": 8}}
    assert run_cli("train", write(tmp_path / "run.yaml", tree)) == 2
    keys = keys_of(capsys.readouterr().err)
    assert keys == ["parallel", "teachers.domain.path", "parallel.tp"]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"student": {}}, ["student.path"]),
        (
            {"data": {"pools": {"a": {"sources": [{"kind": "file"}]}}}},
            ["data.pools.a.sources.0.path"],
        ),
        ({"algorithm": {"kind": "magic"}, "sed": 1}, ["algorithm", "sed"]),
        # What would be wrong with the defaults that take the place of wrong values.
        ({"teachers": {"domain": 5}}, ["teachers.domain"]),
        ({"rollout": 5}, ["rollout"]),
    ],
)
def test_what_follows_from_a_wrong_setting_is_not_reported(
    changes: Tree, keys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(camopd_tree(**changes)))
    assert run_cli("train", str(file)) == 2
    _, *lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0].strip() for line in lines] == keys


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"checkpoint": {"every": "x", "export_every": 15}}, ["checkpoint.every"]),
        ({"parallel": {"tp": "two", "sequence_parallel": True}}, ["parallel.tp"]),
        ({"cluster": {"nodes": "four", "rollout_nodes": 2}}, ["cluster.nodes"]),
    ],
)
def test_config_check_reports_causes_and_all_of_them(
    changes: Tree, keys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(camopd_tree(**{"device": "auto"} | changes)))
    assert run_cli("config", "check", str(file)) == 1
    _, *lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0].strip() for line in lines] == keys


def test_config_check_looks_into_models_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = {"path": str(write_model_config(tmp_path / "model", model_type="mamba"))}
    tree = camopd_tree(student=path, teachers={"general": path, "domain": path})
    config = write(tmp_path / "run.yaml", tree)
    assert run_cli("config", "check", config) == 0
    assert run_cli("config", "check", "--models", config) == 1
    assert "student.path" in capsys.readouterr().err


def test_config_check_reads_the_pools_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a trainer would end with minutes later: an id that stands twice, a row that is no record."""
    model = {"path": str(write_model(tmp_path / "model"))}
    rows = tmp_path / "rows.jsonl"
    pools = {
        "general": {"sources": [{"kind": "file", "path": str(rows)}]},
        "medical": {"sources": [{"kind": "packaged", "name": "medical"}]},
    }
    tree = camopd_tree(student=model, teachers={"general": model, "domain": model})
    tree |= {"data": {"pools": pools, "max_prompt_tokens": 64}, "runs_dir": str(tmp_path / "runs")}
    config = write(tmp_path / "run.yaml", tree)
    problems = {
        '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n': "two records have the id 'x'",
        '{"prompt": "a"}\n{"question": "b"}\n': f"{rows}: row 2 has no field 'prompt'",
        '{"prompt": "a"}\n{"prompt"\n': f"{rows}: row 2 is not JSON",
    }
    for text, problem in problems.items():
        rows.write_text(text)
        assert run_cli("config", "check", config) == 0
        assert run_cli("config", "check", "--models", config) == 1
        assert problem in capsys.readouterr().err
        assert run_cli("train", config) == 2
        assert problem in capsys.readouterr().err
    rows.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert run_cli("config", "check", "--models", config) == 0


@pytest.mark.parametrize("kind", ["eval", "refine", "prepare"])
def test_config_check_opens_what_other_kinds_of_files_name(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows = write_model(tmp_path / "model"), tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", "answer": "b"}\n')
    served = {"kind": "serve", "path": str(model)}
    trees: dict[str, Tree] = {
        "eval": {
            "systems": {"mine": served},
            "benchmarks": {"medical_heldout": {}},
        },
        "refine": {"input": {"path": str(rows)}, "rewrite": {"model": str(model)}},
        "prepare": {
            "recipe": {"kind": "mixture", "parts": {"a": {"source": {"files": [str(rows)]}}}},
            "tokenizer": str(model),
        },
    }
    key = {"eval": "systems.mine.path", "refine": "rewrite.model", "prepare": "tokenizer"}[kind]
    config = write(tmp_path / "config.yaml", trees[kind] | {"name": "tiny"})
    assert run_cli("config", "check", "--models", config) == 0
    (model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert run_cli("config", "check", config) == 0
    assert run_cli("config", "check", "--models", config) == 1
    said = capsys.readouterr().err
    assert f"{key}: {model / 'tokenizer.json'}: found a Git LFS pointer, expected JSON" in said
    if kind != "eval":
        rows.unlink()
        assert run_cli("config", "check", "--models", config) == 1
        assert f"found '{rows}', which does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "key"), [("run", "steps"), ("campaign", "stages")])
def test_config_schema_prints_json(
    kind: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("config", "schema", "--kind", kind) == 0
    printed = capsys.readouterr().out
    assert key in json.loads(printed)["properties"]
    assert run_cli("config", "schema", "--write", str(tmp_path)) == 0
    assert (tmp_path / f"{kind}.json").read_text() == printed


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that took one step and is done."""
    run = RunDir(tmp_path / "tiny")
    run.create(make_config())
    run.metrics_file.write_text('{"step": 0, "branch": "start"}\n')
    run.write_progress({"step": 1, "steps": 1, "phase": "done", "done": True})
    return run


@pytest.mark.parametrize("options", [[], ["--watch"]])
def test_status_of_a_run(
    run: RunDir, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("status", str(run.path), *options) == 0
    assert "done" in capsys.readouterr().out


def test_status_of_a_run_that_never_starts_is_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["status", str(tmp_path / "later"), "--watch", "--give-up", "0"]
    assert run_cli(*arguments) == 2
    assert "nothing was written" in capsys.readouterr().err


def test_report_writes_the_picture_where_it_is_told(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("report", str(run.path)) == 0
    assert (run.report / "effect.png").exists()
    assert run_cli("report", str(run.path), "--picture", str(tmp_path / "mine.png")) == 0
    assert (tmp_path / "mine.png").exists()
    assert "held out, nats per token" in capsys.readouterr().out


def test_ctrl_c_ends_a_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megadistill.cli.check.check_run", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["config", "check", "configs/embedded/sft_medical.yaml"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == (
        "megadistill: interrupted; the same command goes on from here\n"
    )


def test_what_the_system_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    tree = {"name": "small", "stages": {"one": {"verb": "config", "args": ["schema"]}}}
    config = tmp_path / "campaign.yaml"
    config.write_text(yaml.safe_dump(tree))
    below_a_file = ["campaign", str(config), "--local", f"runs_dir={tmp_path}/file"]
    assert run_cli(*below_a_file) == 2
    said = f"megadistill: {tmp_path}/file/small: Not a directory; expected a directory\n"
    assert capsys.readouterr().err == said

    for number, advice in (
        (errno.ENOSPC, "make room there"),
        (errno.EROFS, "expected a place that can be written"),
        (errno.EACCES, "expected a place that can be written"),
    ):

        def refuse(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number), str(tmp_path / "runs"))

        monkeypatch.setattr("megadistill.launch.campaign.write_atomic", refuse)
        assert run_cli("campaign", str(config), "--local", f"runs_dir={tmp_path}") == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"megadistill: {tmp_path}/runs: {os.strerror(number)}; {advice}")
