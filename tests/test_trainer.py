"""The trainer as a process: what its end says, and what it leaves unsaid."""

import os
import subprocess
import sys
from pathlib import Path

from megadistill.rundir import RunDir
from tests.tiny import make_config, make_tokenizer, sft_tree, write_model_config


def test_a_mistake_is_one_line_and_its_traceback_lies_beside_the_log(tmp_path: Path) -> None:
    student = tmp_path / "student"
    tokenizer = make_tokenizer(["a b c"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(student)
    write_model_config(student)
    run = RunDir(tmp_path / "run")
    run.create(make_config(sft_tree(student={"path": str(student)})))
    done = subprocess.run(
        [sys.executable, "-m", "megadistill.trainer", str(run.path)],
        env={**os.environ, "MEGADISTILL_ATTEMPT": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"megadistill: student.path: {student} has no chat template\n"
    traceback = (run.path / "logs" / "trainer-0.3.traceback").read_text()
    assert "common_tokenizer" in traceback
