"""Every variant that a configuration can name is implemented, and every implementation is named."""

from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from megadistill.algorithms.mopd import SCORES
from megadistill.config import ConfigError, EvaluateConfig, algorithm, parse, schema
from megadistill.config.distillation import BranchConfig
from megadistill.data import sources
from tests.tiny import Tree, camopd_tree, decisions, raft_tree, sft_tree

BRANCHES: Tree = {
    "general": {"pool": "general", "teacher": "general"},
    "domain": {"pool": "medical", "teacher": "domain"},
}
TREES = {
    "sft": sft_tree(),
    "mopd": camopd_tree(algorithm={"kind": "mopd"} | BRANCHES),
    "camopd": camopd_tree(algorithm={"kind": "camopd"} | BRANCHES),
    "raft": raft_tree(),
}


def variants(union: Any) -> set[type[BaseModel]]:
    """The classes of a tagged union."""
    assert get_origin(union) is Annotated
    return set(get_args(get_args(union)[0]))


def kinds(union: Any) -> set[str]:
    return {variant.model_fields["kind"].default for variant in variants(union)}


def test_every_algorithm_of_the_configuration_is_tried_here() -> None:
    assert set(TREES) == kinds(algorithm.AlgorithmConfig)


@pytest.mark.parametrize("kind", TREES)
def test_every_algorithm_of_the_configuration_is_implemented(kind: str) -> None:
    made = decisions(TREES[kind])
    assert sum(made.draws(0).values()) == 4


def test_every_source_of_the_configuration_has_a_reader_and_none_is_left_over() -> None:
    assert variants(schema.Source) == set(sources._READERS)


def test_every_packaged_set_is_shipped() -> None:
    for name in get_args(schema.PackagedSource.__annotations__["name"]):
        pool = schema.PoolConfig(sources=[schema.PackagedSource(name=name)])
        assert next(sources.read_pool(pool)).messages


def test_every_role_of_a_branch_has_a_score() -> None:
    assert set(SCORES) == set(get_args(BranchConfig.model_fields["role"].annotation))


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"systems": {"a": {"kind": "serve", "pth": "x"}}}, "systems.a.pth"),
        ({"models": {"judge": {"kind": "endpoint", "tries": 0}}}, "models.judge.tries"),
    ],
)
def test_an_error_in_a_model_has_the_key_that_its_user_wrote(tree: Tree, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"\n  {key}: found "):
        parse(EvaluateConfig, tree)


def test_every_kind_is_used_by_a_shipped_configuration_or_is_a_users_own() -> None:
    configs = Path(__file__).parents[1] / "configs"
    used = {found for path in configs.rglob("*.yaml") for found in kinds_in(path)}
    users_own = {"reasoning_gym", "file", "dataset"}
    assert used | users_own >= kinds(algorithm.AlgorithmConfig) | kinds(schema.Source)


def kinds_in(path: Path) -> set[str]:
    """Every value of a `kind` key in a YAML file."""
    found: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            found.update(str(value) for key, value in node.items() if key == "kind")
            node = list(node.values())
        for child in node if isinstance(node, list) else []:
            visit(child)

    visit(yaml.safe_load(path.read_text(encoding="utf-8")))
    return found
