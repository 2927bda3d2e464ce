"""Rollouts in a file come back as they were."""

from pathlib import Path

import numpy as np

from megadistill.rollout.store import read_rollouts, write_rollouts
from megadistill.types import Rollout
from tests.tiny import float32, make_prompt


def test_rollouts_come_back_to_the_bit(tmp_path: Path) -> None:
    rollout = Rollout(
        prompt=make_prompt("medical-1", pool="medical", answer=None),
        response_ids_R=np.asarray([5, 2], dtype=np.int32),
        logprobs_R=float32([-0.1, np.nextafter(np.float32(-2), np.float32(0))]),
        policy_version=7,
        finish_reason="length",
    )
    write_rollouts(tmp_path / "ahead.parquet", [rollout])
    (found,) = read_rollouts(tmp_path / "ahead.parquet")
    assert found.prompt == rollout.prompt
    assert found.response_ids_R.dtype == np.int32
    assert found.response_ids_R.tolist() == [5, 2]
    assert found.logprobs_R.tobytes() == rollout.logprobs_R.tobytes()
    assert (found.policy_version, found.finish_reason) == (7, "length")
