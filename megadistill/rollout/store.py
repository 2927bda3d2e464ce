"""Rollouts as a Parquet file, to the last bit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megadistill.types import Prompt, Rollout


def write_rollouts(file: Path, rollouts: Sequence[Rollout]) -> None:
    """Write `rollouts` to `file`; their numbers come back as they were."""
    rows = [columns(rollout) for rollout in rollouts]
    pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")


def read_rollouts(file: Path) -> list[Rollout]:
    """The reverse of `write_rollouts`."""
    return [_rollout(row) for row in pq.read_table(file).to_pylist()]


def columns(rollout: Rollout) -> dict[str, Any]:
    """Column -> value of one rollout, in every file that holds rollouts."""
    prompt = rollout.prompt
    return {
        "prompt_id": prompt.id,
        "pool": prompt.pool,
        "messages": [dict(message) for message in prompt.messages],
        "prompt_ids": list(prompt.token_ids),
        "answer": prompt.answer,
        "response_ids": rollout.response_ids_R.tolist(),
        "rollout_logprobs": rollout.logprobs_R.tolist(),
        "policy_version": rollout.policy_version,
        "finish_reason": rollout.finish_reason,
    }


def _rollout(row: Mapping[str, Any]) -> Rollout:
    """The reverse of `columns`."""
    prompt = Prompt(
        id=row["prompt_id"],
        pool=row["pool"],
        messages=tuple(row["messages"]),
        token_ids=tuple(row["prompt_ids"]),
        answer=row["answer"],
    )
    return Rollout(
        prompt=prompt,
        response_ids_R=np.asarray(row["response_ids"], dtype=np.int32),
        logprobs_R=np.asarray(row["rollout_logprobs"], dtype=np.float32),
        policy_version=row["policy_version"],
        finish_reason=row["finish_reason"],
    )
