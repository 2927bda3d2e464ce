"""Every rollout with its scores, one Parquet file a step: browsable, and enough to replay a step."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megadistill.atomic import atomic_file, remove_torn
from megadistill.collect import Batch
from megadistill.rollout.store import columns


def store_rollouts(file: Path, batch: Batch) -> None:
    """Write the batch's rollouts to `file`, whole or absent; nothing for a batch without any."""
    if not batch.scored:
        return
    table = pa.Table.from_pylist([_row(batch, index) for index in range(len(batch.scored))])
    remove_torn(file.parent, file.name)
    with atomic_file(file, sync=False) as made:
        pq.write_table(table, made, compression="zstd")


def _row(batch: Batch, index: int) -> dict[str, Any]:
    scored = batch.scored[index]
    return columns(scored.rollout) | {
        "branch": scored.branch,
        "student_logprobs": scored.student_logprobs_R.tolist(),
        "teacher_logprobs": scored.teacher_logprobs_R.tolist(),
        "score": batch.selection.scores[index],
        "selected": index in batch.selection.selected,
    }
