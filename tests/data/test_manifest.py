"""A run goes on with the prompts with which it began, or with others where that is said."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from megadistill.config import RunConfig
from megadistill.data.manifest import manifest
from megadistill.data.pools import make_pools
from megadistill.rundir import RunDir
from megadistill.startup import check_data
from tests.tiny import CHAT_TEMPLATE, camopd_tree, make_config, make_tokenizer

WORDS = [f"word{number}" for number in range(40)]


class World:
    """A run whose two pools are the same file of prompts."""

    def __init__(self, path: Path) -> None:
        self.run = RunDir(path / "run")
        self.file = path / "rows.jsonl"
        self.tokenizer = make_tokenizer([" ".join(WORDS)])
        self.write(WORDS[:39])
        self.run.create(self.config())

    def write(self, prompts: Sequence[str]) -> None:
        self.file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))

    def config(self, **data: object) -> RunConfig:
        pool = {"sources": [{"kind": "file", "path": str(self.file), "limit": 39}]}
        pools = {"general": pool, "medical": pool}
        return make_config(camopd_tree(data={"pools": pools, "max_prompt_tokens": 64} | data))

    def start(self, **data: object) -> None:
        """What every rank checks at the start of an attempt."""
        config = self.config(**data)
        pools = make_pools(config.data, self.tokenizer, 0, ["general", "medical"])
        marks = manifest(config.data, self.tokenizer, pools)
        for writes in (True, False):
            check_data(self.run, config, marks, writes=writes)

    def events(self) -> list[dict[str, str]]:
        file = self.run.path / "state" / "events.jsonl"
        return [json.loads(line) for line in file.open()] if file.exists() else []


@pytest.fixture
def world(tmp_path: Path) -> World:
    """The run after its first start."""
    world = World(tmp_path)
    world.start()
    return world


def test_a_run_whose_files_are_as_they_were_resumes(world: World) -> None:
    world.start()
    world.write(WORDS[:40])  # one more row, beyond the limit: no prompt differs
    world.start()
    assert not world.events()


def test_marks_that_nobody_can_read_are_named_and_kept(world: World) -> None:
    marks = world.run.path / "state" / "data.json"
    marks.write_text("{nope")
    with pytest.raises(ValueError, match=r"state/data\.json: damaged, found no JSON"):
        world.start()
    assert marks.read_text() == "{nope"


def test_a_row_put_in_front_of_the_others_is_refused_with_what_changed(world: World) -> None:
    before = world.file.stat().st_size
    world.write(["word39", *WORDS[:38]])
    with pytest.raises(ValueError, match="found other prompts than those with which the run") as e:
        world.start()
    lines = str(e.value).splitlines()
    after = world.file.stat().st_size
    file = f"  data.pools.general.sources[0] file {world.file}: {before} bytes, "
    assert any(line.startswith(file) and f"-> {after} bytes, " in line for line in lines)
    pool = "  data.pools.general: 35 prompts to train on, 4 held out, 0 too long, 0 unusable, "
    assert any(line.startswith(pool) for line in lines)
    assert lines[-1].endswith("data.accept_changes=true")
    world.write(WORDS[:39])
    world.start()


def test_one_changed_word_is_refused(world: World) -> None:
    world.write(["word7", *WORDS[1:39]])
    with pytest.raises(ValueError, match=r"data\.pools\.general: .* -> "):
        world.start()


def test_another_template_and_another_vocabulary_are_refused(world: World) -> None:
    world.tokenizer.chat_template = CHAT_TEMPLATE + " "
    with pytest.raises(ValueError, match=r"the chat template: [0-9a-f]{16} -> [0-9a-f]{16}\n"):
        world.start()
    world.tokenizer = make_tokenizer([" ".join(WORDS), "new"])
    with pytest.raises(ValueError, match=r"the tokenizer's vocabulary: [0-9a-f]{16} -> "):
        world.start()


def test_another_day_in_the_template_is_refused(world: World) -> None:
    world.tokenizer.chat_template = "{{ strftime_now('word%d') }} " + CHAT_TEMPLATE
    (world.run.path / "state" / "data.json").unlink()
    world.start(date="2026-03-01")
    with pytest.raises(ValueError, match=r"data\.pools\.general: "):
        world.start(date="2026-03-12")


def test_other_prompts_are_accepted_by_a_word_that_is_kept(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.write(WORDS[1:39])
    with caplog.at_level(logging.WARNING):
        world.start(accept_changes=True)
    assert "goes on with other prompts" in caplog.text
    (event,) = world.events()
    assert event["what"] == "data changed"
    assert {"data.pools.general", "data.pools.medical"} <= event.keys()
    world.start()  # the new ones are the run's from here
    assert len(world.events()) == 1


def test_a_run_of_an_older_version_takes_the_prompts_that_it_finds(world: World) -> None:
    (world.run.path / "state" / "data.json").unlink()
    world.write(WORDS[5:20])
    world.start()
    world.start()
