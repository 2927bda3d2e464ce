"""Stages whose shards run in the test's own process, one after the other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from megadistill.launch.shards import run_shard
from megadistill.launch.stages import ShardedStage


@contextmanager
def shards_in_process(runs: list[str]) -> Iterator[None]:
    """While it lasts; the labels of the shards that are run are added to `runs`."""

    def run_here(stage: ShardedStage) -> None:
        stage.prepare(afresh=True)
        for shard in stage.shards:
            folder = stage.folders[shard.key]
            if not folder.done_file.exists():
                runs.append(shard.label)
                with mock.patch.dict(os.environ, shard.environment):
                    run_shard(folder.path)

    with mock.patch.object(ShardedStage, "run_here", run_here):
        yield
