from pathlib import Path
from typing import Any

import pytest
import yaml

from megadistill.config import CampaignConfig, ConfigError, dump, kind_of, load, parse


def tree(**stages: dict[str, Any]) -> dict[str, Any]:
    return {"name": "c", "stages": stages}


def problems(given: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse(CampaignConfig, given, source="x.yaml")
    first, *rest = str(raised.value).splitlines()
    assert first == f"x.yaml: {len(rest)} problem(s)"
    return [line.strip() for line in rest]


def test_stages_come_after_those_they_need() -> None:
    campaign = parse(
        CampaignConfig,
        tree(
            report={"verb": "report", "needs": ["train", "evaluate"]},
            evaluate={"verb": "eval", "needs": ["train"], "array": 4},
            train={"verb": "train", "config": "run.yaml"},
        ),
    )
    assert campaign.ordered() == ["train", "evaluate", "report"]
    assert parse(CampaignConfig, yaml.safe_load(dump(campaign))) == campaign


def test_every_problem_is_told_at_once_with_its_key() -> None:
    found = problems(
        {
            **tree(
                one={"verb": "Train me", "extra": 1},
                two={"verb": "eval", "array": -1, "resources": {"nodes": 0}},
            ),
            "cluster": {"gpus": 8},
        }
    )
    keys = ["stages.one.verb", "stages.one.extra", "stages.two.array"]
    assert [line.split(":")[0] for line in found] == [
        *keys,
        "stages.two.resources.nodes",
        "cluster.gpus",
    ]


def test_needs_must_exist_and_not_go_in_circles() -> None:
    found = problems(
        tree(
            a={"verb": "eval", "needs": ["b"]},
            b={"verb": "eval", "needs": ["a"]},
            c={"verb": "eval", "needs": ["nobody"]},
        )
    )
    assert found[0] == "stages.c.needs: found 'nobody', expected one of ['a', 'b', 'c']"
    assert found[1].startswith("stages: found ")
    assert found[1].endswith("expected no circle")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"verb": "train"}, "train needs `config`"),
        ({"verb": "train", "config": "x", "array": 2}, "expected a `name=` with {shard} in it"),
        ({"verb": "submit"}, "expected one that does work"),
        ({"verb": "eval", "args": ["{shard}"]}, "found {shard}, expected `array` beside it"),
    ],
)
def test_what_makes_no_sense_is_refused(stage: dict[str, Any], message: str) -> None:
    (found,) = problems(tree(only=stage))
    assert found.startswith("stages.only.")
    assert message in found


def test_names_are_names_of_directories() -> None:
    assert problems(tree(**{"../up": {"verb": "eval"}}))
    assert problems({**tree(), "name": "a/b"})


def test_a_campaign_is_told_from_a_run(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree(only={"verb": "eval"})))
    assert kind_of(file) == "campaign"
    assert load(CampaignConfig, file, ["stages.only.array=3"]).stages["only"].array == 3
