"""Files, includes, overrides and dumps of configurations, and what is said about wrong ones."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadistill.config import (
    CampaignConfig,
    ConfigError,
    EvaluateConfig,
    RunConfig,
    cache_dir,
    dump,
    load,
    parse,
    read_tree,
    resolve_path,
)
from megadistill.config.algorithm import CamopdConfig, MopdConfig
from megadistill.config.schema import FileSource, PackagedSource
from tests.tiny import Tree, camopd_tree, sft_tree

CONFIGS = Path(__file__).parents[2] / "configs"
RUN_CONFIGS = [
    path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if {"name", "algorithm"} <= read_tree(path).keys()
]
"""Without a name it is a fragment that others include, without an algorithm no training run."""


def write(file: Path, tree: Tree) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def dataset(path: str, **changes: Any) -> Tree:
    return {"kind": "dataset", "path": path} | changes


def error_lines(tree: Tree) -> list[str]:
    """What `parse` complains about, without the line that counts."""
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, tree)
    return str(caught.value).splitlines()[1:]


def test_an_unknown_key_is_an_error_that_names_it() -> None:
    (line,) = error_lines(camopd_tree(optimizer={"lr": 1e-6, "learning_rate": 1e-6}))
    assert line.startswith("  optimizer.learning_rate: found 1e-06")


def test_a_wrong_type_is_an_error_with_key_and_value() -> None:
    (line,) = error_lines(camopd_tree(batch={"size": "many"}))
    assert line.startswith('  batch.size: found "many"')
    assert "integer" in line


def test_a_value_out_of_range_is_an_error() -> None:
    (line,) = error_lines(camopd_tree(parallel={"tp": 0}))
    assert line.startswith("  parallel.tp: found 0")


def test_all_errors_are_reported_at_once_with_their_keys() -> None:
    tree = camopd_tree(steps="soon", bogus=1, student={}, precision="int4")
    keys = {line.split(":")[0].strip() for line in error_lines(tree)}
    assert keys == {"steps", "bogus", "student.path", "precision"}


def test_the_count_in_the_message_is_the_number_of_lines() -> None:
    with pytest.raises(ConfigError, match=r"^here: 2 problem\(s\)\n"):
        parse(RunConfig, camopd_tree(steps="soon", bogus=1), source="here")


def test_keys_inside_tagged_unions_are_written_as_in_yaml() -> None:
    tree = camopd_tree()
    tree["algorithm"]["general"]["mass"] = 2
    tree["data"]["pools"]["file"] = {"sources": [{"kind": "file", "path": 3.5, "limit": 0}]}
    keys = {line.split(":")[0].strip() for line in error_lines(tree)}
    assert keys == {
        "algorithm.general.mass",
        "data.pools.file.sources.0.path",
        "data.pools.file.sources.0.limit",
    }


@pytest.mark.parametrize(
    ("kind", "tree", "key"),
    [
        # A key that is called as a member of the union is.
        (RunConfig, {"algorithm": {"kind": "raft", "sft": "perhaps"}}, "algorithm.sft"),
        (RunConfig, {"algorithm": {"kind": "sft", "sft": True}}, "algorithm.sft"),
        # A union without tags, a key that is no name, and a section that is none.
        (EvaluateConfig, {"benchmarks": {"a": {"judge": {}}}}, "benchmarks.a.judge"),
        (EvaluateConfig, {"benchmarks": {"../up": {}}}, "benchmarks.../up"),
        (CampaignConfig, {"stages": {"a": 5}}, "stages.a"),
        # Contradictions of a section that lies in a list.
        (
            RunConfig,
            {"data": {"pools": {"p": {"sources": [dataset("a", split="x[:3]")]}}}},
            "data.pools.p.sources.0.split",
        ),
    ],
)
def test_a_problem_has_the_key_that_its_user_wrote(
    kind: type[RunConfig | EvaluateConfig | CampaignConfig], tree: Tree, key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(kind, tree)
    _, *lines = str(caught.value).splitlines()
    wrong = {line.split(": ")[0].strip() for line in lines if "Field required" not in line}
    assert wrong == {key}


def test_names_that_are_not_defined_are_listed_together() -> None:
    tree = camopd_tree(evaluate={"heldout": {"x": {"pool": "nowhere", "teacher": "nobody"}}})
    tree["algorithm"]["general"]["teacher"] = "nobody"
    assert error_lines(tree) == [
        "  algorithm.general.teacher: found 'nobody', expected one of ['domain', 'general']",
        "  evaluate.heldout.x.pool: found 'nowhere', expected one of ['general', 'medical']",
        "  evaluate.heldout.x.teacher: found 'nobody', expected one of ['domain', 'general']",
    ]


def test_files_among_the_overrides_are_merged_in_their_order(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", sft_tree(seed=1))
    longer = write(tmp_path / "longer.yaml", {"steps": 7, "optimizer": {"lr": 0.5}})
    inner = write(tmp_path / "inner.yaml", {"seed": 5, "optimizer": {"beta1": 0.5}})
    outer = write(tmp_path / "outer.yaml", {"include": inner.name, "steps": 8})
    config = load(RunConfig, base, [str(longer), "steps=9", str(outer), "optimizer.beta1=0.75"])
    assert (config.seed, config.steps) == (5, 8)
    assert (config.optimizer.lr, config.optimizer.beta1) == (0.5, 0.75)
    with pytest.raises(ConfigError, match="no such file"):
        load(RunConfig, base, [str(tmp_path / "none.yaml")])


def test_an_unknown_kind_lists_the_known_ones() -> None:
    (line,) = error_lines(camopd_tree(algorithm={"kind": "dpo", "pool": "medical"}))
    assert line.startswith("  algorithm:")
    assert "'sft', 'mopd', 'camopd'" in line


def test_on_policy_runs_need_rollout_engines() -> None:
    tree = camopd_tree()
    del tree["rollout"]
    assert error_lines(tree) == ["  rollout: missing, camopd needs one"]


def test_sft_refuses_rollout_engines_that_it_has_no_use_for() -> None:
    (line,) = error_lines(sft_tree(rollout={}))
    assert line == "  rollout: found one, expected none for sft without evaluate.heldout"


def test_heldout_measurements_need_rollout_engines() -> None:
    heldout = {"every": 1, "heldout": {"x": {"pool": "medical", "teacher": "domain"}}}
    tree = sft_tree(evaluate=heldout, teachers={"domain": {"path": "cache:domain"}})
    (line,) = error_lines(tree)
    assert line.startswith("  evaluate.heldout: needs rollout engines")
    assert parse(RunConfig, tree | {"rollout": {"max_tokens": 8}}).rollout is not None


def test_held_out_answers_have_a_pool_and_a_name_of_their_own() -> None:
    heldout = {"x": {"pool": "medical", "teacher": "domain"}}
    tree = camopd_tree(evaluate={"heldout": heldout, "answers": {"y": {"pool": "nowhere"}}})
    (line,) = error_lines(tree)
    assert line.startswith("  evaluate.answers.y.pool: found 'nowhere'")
    tree = camopd_tree(evaluate={"heldout": heldout, "answers": {"x": {"pool": "medical"}}})
    (line,) = error_lines(tree)
    assert "found ['x'] in heldout, too" in line


@pytest.mark.parametrize("change", [{"mass": 0.8}, {"mass": 0.5}, {"scale": 2.0}])
def test_vanilla_mopd_refuses_selection_and_scaling(change: Tree) -> None:
    tree = camopd_tree()
    tree["algorithm"] |= {"kind": "mopd"}
    tree["algorithm"]["general"] = {"pool": "general", "teacher": "general"} | change
    (line,) = error_lines(tree)
    assert line.startswith(f"  algorithm.general.{next(iter(change))}: ")


def test_sequence_parallel_needs_tensor_parallel() -> None:
    (line,) = error_lines(camopd_tree(parallel={"sequence_parallel": True}))
    assert line == "  parallel.sequence_parallel: found true with tp = 1, expected tp > 1"
    parse(RunConfig, camopd_tree(parallel={"sequence_parallel": True, "tp": 2}))


def test_including_files_merge_key_by_key_and_override_what_they_include(tmp_path: Path) -> None:
    write(tmp_path / "base" / "all.yaml", camopd_tree(optimizer={"lr": 1e-3, "beta1": 0.8}))
    top = write(
        tmp_path / "run.yaml", {"include": "base/all.yaml", "name": "mine", "optimizer": {"lr": 1}}
    )
    config = load(RunConfig, top)
    assert (config.name, config.optimizer.lr, config.optimizer.beta1) == ("mine", 1.0, 0.8)
    assert config.batch.size == 4


def test_later_includes_win_over_earlier_ones(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", camopd_tree(seed=1, optimizer={"lr": 1e-3, "eps": 1e-6}))
    write(tmp_path / "b.yaml", {"seed": 2, "optimizer": {"lr": 1e-4}})
    config = load(RunConfig, write(tmp_path / "run.yaml", {"include": ["a.yaml", "b.yaml"]}))
    assert (config.seed, config.optimizer.lr, config.optimizer.eps) == (2, 1e-4, 1e-6)


def test_another_kind_replaces_the_included_section(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", camopd_tree(algorithm=camopd_tree()["algorithm"] | SCHEDULE))
    branch = camopd_tree()["algorithm"]["domain"]
    mopd = {"kind": "mopd", "general": branch, "domain": branch}
    top = write(tmp_path / "run.yaml", {"include": "base.yaml", "algorithm": mopd})
    assert isinstance(load(RunConfig, top).algorithm, MopdConfig)


def test_the_same_kind_keeps_the_rest_of_the_included_section(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", camopd_tree(algorithm=camopd_tree()["algorithm"] | SCHEDULE))
    change = {"kind": "camopd", "general": {"scale": 3.0}}
    top = write(tmp_path / "run.yaml", {"include": "base.yaml", "algorithm": change})
    algorithm = load(RunConfig, top).algorithm
    assert isinstance(algorithm, CamopdConfig)
    assert (algorithm.schedule.general, algorithm.general.scale) == (5, 3.0)
    assert algorithm.general.teacher == "general"


def test_lists_replace_lists(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", camopd_tree())
    sources = [{"kind": "file", "path": "mine.jsonl"}]
    change = {"include": "base.yaml", "data": {"pools": {"general": {"sources": sources}}}}
    config = load(RunConfig, write(tmp_path / "run.yaml", change))
    assert config.data.pools["general"].sources == [FileSource(path="mine.jsonl")]
    assert config.data.pools["medical"].sources == [PackagedSource(name="medical")]


def test_an_include_cycle_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"include": "b.yaml"})
    write(tmp_path / "b.yaml", {"include": "a.yaml"})
    with pytest.raises(ConfigError, match=r"a\.yaml: includes itself"):
        load(RunConfig, tmp_path / "a.yaml")


def test_one_file_may_be_included_twice_along_different_ways(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", camopd_tree())
    write(tmp_path / "left.yaml", {"include": "base.yaml", "seed": 3})
    write(tmp_path / "right.yaml", {"include": "base.yaml", "name": "right"})
    top = write(tmp_path / "run.yaml", {"include": ["left.yaml", "right.yaml"]})
    assert load(RunConfig, top).name == "right"


def test_a_missing_include_is_an_error_that_names_it(tmp_path: Path) -> None:
    top = write(tmp_path / "run.yaml", {"include": "gone.yaml"})
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such file"):
        load(RunConfig, top)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: [1",
            r"bad\.yaml: not valid YAML: while parsing a flow sequence \(line 1, column 4\): .*",
        ),
        ("a: \t- x\n@", r"bad\.yaml: not valid YAML: .*\(line 1, column .*\)"),
        ("- 1\n- 2", r"found \[1, 2\], expected a mapping of settings"),
        ("", "found nothing, expected a mapping of settings"),
        ("words", 'found "words", expected a mapping of settings'),
    ],
)
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{message}$") as caught:
        load(RunConfig, file)
    assert "\n" not in str(caught.value)


def test_a_directory_instead_of_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(RunConfig, tmp_path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=7", lambda config: config.steps == 7),
        ("optimizer.lr=3e-5", lambda config: config.optimizer.lr == 3e-5),
        ("algorithm.general.scale=3", lambda config: config.algorithm.general.scale == 3),
        ("parallel.tp=2", lambda config: config.parallel.tp == 2),
        ("cluster.setup=[a, b]", lambda config: config.cluster.setup == ["a", "b"]),
        ("rollout.max_model_len=null", lambda config: config.rollout.max_model_len is None),
        ("student.path=/x=y", lambda config: config.student.path == "/x=y"),
        ('log.wandb="off"', lambda config: config.log.wandb == "off"),
    ],
)
def test_overrides_reach_any_depth(tmp_path: Path, override: str, expected: Any) -> None:
    tree = camopd_tree(rollout={"max_model_len": 512}, log={"wandb": "offline"})
    assert expected(load(RunConfig, write(tmp_path / "run.yaml", tree), [override]))


def test_the_last_of_two_overrides_wins(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", camopd_tree())
    assert load(RunConfig, file, ["steps=5", "steps=6"]).steps == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("steps.more=3", "'steps' is not a section"),
        ("steps=[1", "not valid YAML"),
        ("nosuch.key=3", "nosuch"),
    ],
)
def test_a_bad_override_is_an_error(tmp_path: Path, override: str, message: str) -> None:
    file = write(tmp_path / "run.yaml", camopd_tree())
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, file, [override])


@pytest.mark.parametrize("tree", [camopd_tree(), sft_tree()], ids=["camopd", "sft"])
def test_a_dumped_configuration_loads_as_the_same(tmp_path: Path, tree: Tree) -> None:
    tree = tree | {"optimizer": {"lr": 1.25e-7}, "runs_dir": "läufe"}
    config = parse(RunConfig, tree)
    file = tmp_path / "dumped.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(RunConfig, file) == config
    assert dump(load(RunConfig, file)) == dump(config)


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load(RunConfig, path).steps >= 1


def test_shipped_configurations_are_found() -> None:
    assert {"camopd_medical.yaml", "sft_medical.yaml"} <= {path.name for path in RUN_CONFIGS}


def test_shipped_runs_do_not_share_a_run_directory() -> None:
    configs = [load(RunConfig, path) for path in RUN_CONFIGS]
    places = [(config.runs_dir, config.name) for config in configs]
    assert sorted(set(places)) == sorted(places)


def test_the_schema_is_json_and_describes_fields() -> None:
    schema = json.loads(json.dumps(RunConfig.model_json_schema()))
    assert schema["properties"]["steps"]["minimum"] == 1
    assert "CaMOPD A.7" in schema["$defs"]["OptimizerConfig"]["properties"]["lr"]["description"]


def test_importing_the_configuration_takes_less_than_a_second_and_no_torch() -> None:
    code = (
        "import sys, megadistill.config;"
        "heavy = {'torch', 'transformers', 'megatron', 'vllm', 'datasets'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, because other processes may hold the machine up.
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 1.0


def test_cache_paths_lie_below_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGADISTILL_CACHE", str(tmp_path))
    assert resolve_path("cache:model") == str(tmp_path / "model")


def test_without_a_setting_the_cache_is_in_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGADISTILL_CACHE")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/.cache/megadistill")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/models/a", "/somewhere/models/a"),
        ("$STORE/a", "/store/a"),
        ("/abs/$STORE", "/abs//store"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("org/$STORE", "org/$STORE"),
    ],
)
def test_paths_are_expanded_and_hub_names_are_not(
    monkeypatch: pytest.MonkeyPatch, path: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("STORE", "/store")
    assert resolve_path(path) == expected


SCHEDULE = {"schedule": {"general": 5, "domain": 1}}


def test_an_override_of_one_alias_leaves_the_other(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("one: &shared {path: a}\ntwo: *shared\n")
    assert read_tree(file, ["one.path=b"]) == {"one": {"path": "b"}, "two": {"path": "a"}}


@pytest.mark.parametrize("include", ["", "3", "[1]"])
def test_an_include_that_names_no_file_is_refused(include: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"include: {include}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: include: found .*, expected a file"):
        read_tree(file)


@pytest.mark.parametrize("override", [".batch=3", "batch..size=3", "=3"])
def test_an_override_without_a_key_is_refused(override: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("batch: {size: 1}\n")
    with pytest.raises(ConfigError, match=r"expected key\.path=value"):
        read_tree(file, [override])


BRANCHES = {
    "general": {"pool": "general", "teacher": "general"},
    "medical": {"pool": "medical", "teacher": "domain", "role": "preserve", "mass": 0.5},
}


def family_tree(**settings: Any) -> Tree:
    return camopd_tree(algorithm={"kind": "mopd", "branches": BRANCHES, **settings})


def test_the_two_branches_of_01_are_branches_with_shares() -> None:
    general = {"pool": "general", "teacher": "general"}
    domain = {"pool": "medical", "teacher": "domain"}
    two = {"kind": "mopd", "general": general, "domain": domain}
    old = camopd_tree(algorithm={"general_share": 0.75, **two})
    branches = {"general": general, "domain": domain | {"role": "preserve"}}
    shares = {"kind": "mixed", "shares": {"general": 0.75, "domain": 0.25}}
    new = camopd_tree(algorithm={"kind": "mopd", "branches": branches, "schedule": shares})
    assert parse(RunConfig, old) == parse(RunConfig, new)
    alone = parse(RunConfig, camopd_tree(algorithm={"general_share": 1.0, **two}))
    assert list(alone.algorithm.all_branches()) == ["general"]
    for share in ("x", None, [1], 3, 0, True):
        with pytest.raises(
            ConfigError, match=r"general_share: found .*, expected a number above 0"
        ):
            parse(RunConfig, camopd_tree(algorithm={"general_share": share, **two}))
    for more in ({"general_share": 0.3}, {"domain": domain}):
        both = camopd_tree(algorithm={"kind": "mopd", "branches": branches, **more})
        with pytest.raises(ConfigError, match=f"{next(iter(more))}: found it beside `branches`"):
            parse(RunConfig, both)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_is_one_that_every_generator_takes(seed: int) -> None:
    (line,) = error_lines(family_tree() | {"seed": seed})
    assert line.startswith(f"  seed: found {seed}: Input should be")


def test_a_step_has_a_prompt_of_every_branch_that_it_mixes() -> None:
    for schedule in ({"kind": "mixed"}, {"kind": "gap"}, {"kind": "velocity"}):
        tree = family_tree(schedule=schedule) | {"batch": {"size": 1}}
        with pytest.raises(ConfigError, match=r"batch\.size: found 1, expected at least 2"):
            parse(RunConfig, tree)
    turns = {"kind": "cycle", "order": ["general", "medical"]}
    assert parse(RunConfig, family_tree(schedule=turns) | {"batch": {"size": 1}}).batch.size == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss": {"kind": "top_k", "size": 1}}, "loss.size: found 1 without tail"),
        ({"importance": {"kind": "mis", "veto": 1.0}}, "importance.veto: found 1.0"),
        (
            {"schedule": {"kind": "cycle", "order": ["general"]}},
            "schedule: no step draws ['medical']",
        ),
        (
            {"schedule": {"kind": "mixed", "shares": {"general": 1.0, "medical": 0.0}}},
            "schedule: no step draws ['medical']",
        ),
        (
            {"schedule": {"kind": "cycle", "order": ["general", "medical", "law"]}},
            "schedule: found ['law'], expected names of branches, ['general', 'medical']",
        ),
        (
            {
                "schedule": {"kind": "counteraction"},
                "branches": BRANCHES | {"general": BRANCHES["medical"]},
            },
            "schedule: found counteraction with the role preserve of every branch, expected at "
            "least one branch with role recover and one with preserve",
        ),
        (
            {"advantage": {"reference": "base"}},
            "advantage.reference: found 'base', expected one of ['domain', 'general']",
        ),
        (
            {"advantage": {"floor": 0.3}, "loss": {"kind": "reverse_kl"}},
            "advantage: found floor with loss.kind reverse_kl",
        ),
        ({"tokens": {"kind": "entropy", "explore": 0.5}}, "tokens.explore: needs advantage.floor"),
        ({"importance": {"low": 1.5}}, "importance.low, high: found 1.5 and 2.0"),
        (
            {"branches": BRANCHES | {"law": {"pool": "law", "teacher": "general"}}},
            "branches.law.pool: found 'law', expected one of ['general', 'medical']",
        ),
        (
            {"schedule": {"kind": "mixed", "shares": {"general": 0.0}}},
            "schedule.shares: found {'general': 0.0}, expected one above 0",
        ),
        ({"loss": {"kind": "top_k", "size": 0}}, "loss.size: found 0"),
    ],
)
def test_decisions_that_do_not_fit_together_are_one_line(settings: Tree, expected: str) -> None:
    (line,) = error_lines(family_tree(**settings))
    assert line.startswith(f"  algorithm.{expected}")


def test_several_responses_are_for_those_who_sample_them() -> None:
    assert parse(RunConfig, family_tree() | {"batch": {"responses": 4}}).batch.responses == 4
    (line,) = error_lines(sft_tree(batch={"responses": 2}))
    assert line.startswith("  batch.responses: found 2, expected 1: sft trains on")
