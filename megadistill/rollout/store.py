"""Rollouts as a Parquet file, to the last bit."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megadistill.types import Prompt, Rollout


def write_rollouts(file: Path, rollouts: Sequence[Rollout]) -> None:
    """Write `rollouts` to `file`; their numbers come back as they were."""
    rows = [
        {
            "prompt": asdict(rollout.prompt),
            "response_ids": rollout.response_ids_R,
            "logprobs": rollout.logprobs_R,
            "policy_version": rollout.policy_version,
            "finish_reason": rollout.finish_reason,
        }
        for rollout in rollouts
    ]
    pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")


def read_rollouts(file: Path) -> list[Rollout]:
    """The reverse of `write_rollouts`."""
    return [
        Rollout(
            prompt=Prompt(
                **row["prompt"]
                | {
                    "messages": tuple(row["prompt"]["messages"]),
                    "token_ids": tuple(row["prompt"]["token_ids"]),
                }
            ),
            response_ids_R=np.asarray(row["response_ids"], dtype=np.int32),
            logprobs_R=np.asarray(row["logprobs"], dtype=np.float32),
            policy_version=row["policy_version"],
            finish_reason=row["finish_reason"],
        )
        for row in pq.read_table(file).to_pylist()
    ]
