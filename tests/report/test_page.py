"""The page of a run: complete, escaped, bounded, and in need of nothing else."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megadistill.report import samples
from megadistill.report.page import write_page
from megadistill.report.samples import load_decoder, shade
from megadistill.rundir import RunDir
from tests.report.runs import (
    ROWS,
    Row,
    make_run,
    step_row,
    write_end,
    write_rollouts,
    write_rows,
    write_tokenizer,
)
from tests.tiny import camopd_tree, raft_tree

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run directory whose student has a tokenizer."""
    write_tokenizer(tmp_path / "student", " ".join(f"word{n:02d}" for n in range(40)))
    return make_run(tmp_path / "tiny", camopd_tree(student={"path": str(tmp_path / "student")}))


def page_of(run: RunDir) -> str:
    return write_page(run, run.report / "report.html").read_text(encoding="utf-8")


def finished(run: RunDir) -> None:
    write_rows(run, ROWS)
    run.write_progress({"step": 4, "steps": 4, "phase": "done", "done": True})


def assert_needs_nothing(page: str) -> None:
    """No tag of the page loads anything, and the page forbids it."""
    tags = re.findall(r"<[a-zA-Z][^>]*>", page)
    loading = [tag for tag in tags if re.search(r"\b(src|href|action|data)\s*=\s*.?\s*http", tag)]
    assert loading == []
    assert not [tag for tag in tags if re.match(r"<(script|link|object|embed|base)\b", tag)]
    assert "@import" not in page
    assert not re.search(r"url\(", page)
    assert "default-src 'none'" in page


def test_the_page_has_every_part_and_needs_nothing_else(run: RunDir) -> None:
    finished(run)
    write_rollouts(run, 1)
    page = page_of(run)
    for heading in ("Effect", "Curves", "Phases and their cost", "Rollouts", "Attempts and nodes"):
        assert f"<h2>{heading}</h2>" in page
    assert "0.8000 ± 0.0100" in page
    assert page.count("<svg") == 9
    assert "http://" not in page
    assert "https://" not in page
    assert_needs_nothing(page)


def test_what_models_and_logs_wrote_is_escaped(run: RunDir) -> None:
    finished(run)
    write_rollouts(run, 1)
    table = pq.read_table(run.rollout_file(1)).to_pylist()
    for row in table:
        row["messages"] = [{"role": "user", "content": HOSTILE}]
        row["finish_reason"] = HOSTILE
    pq.write_table(pa.Table.from_pylist(table), run.rollout_file(1))
    failure = {"node": 0, "what": HOSTILE, "when": 0.0, "detail": HOSTILE}
    write_end(run, 0, {"status": "failed", "message": HOSTILE, "failure": failure})
    write_rows(run, [*ROWS, step_row(5, HOSTILE)])
    page = page_of(run)
    assert "<script" not in page
    assert "<img" not in page
    assert html.escape(HOSTILE).replace("&#x27;", "&#39;") in page
    assert_needs_nothing(page)


def test_a_token_that_is_a_tag_is_shown_as_text(run: RunDir, monkeypatch: Any) -> None:
    finished(run)
    write_rollouts(run, 1)
    monkeypatch.setattr(samples, "load_decoder", lambda _: lambda ids: ["</b><script>"] * len(ids))
    page = page_of(run)
    assert "&lt;/b&gt;&lt;script&gt;" in page
    assert "<script" not in page


def test_tokens_are_decoded_and_coloured_by_their_gap(run: RunDir) -> None:
    finished(run)
    write_rollouts(run, 1)
    page = page_of(run)
    assert (
        '<b class="n4" title="gap -3.000: teacher -3.500, student -0.500, engine -0.500">' in page
    )
    assert re.search(r'<b class="p1"[^>]*> ?word16</b>', page)


@pytest.mark.parametrize(
    ("gap", "name"),
    [(0.0, ""), (0.05, ""), (0.1, "p1"), (-0.5, "n2"), (1.5, "p3"), (-9.0, "n4")],
)
def test_shades(gap: float, name: str) -> None:
    assert shade(gap) == name


def test_without_a_tokenizer_the_ids_are_shown(tmp_path: Path) -> None:
    assert load_decoder([tmp_path / "none"])([3, 14]) == ["<3>", "<14>"]


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS[:2]], ids=["none", "start", "one step"])
def test_a_run_without_rollouts_has_a_page(run: RunDir, rows: list[Row]) -> None:
    write_rows(run, rows)
    page = page_of(run)
    assert "The run has no rollouts." in page
    assert_needs_nothing(page)


def test_a_raft_run_shows_lambda(tmp_path: Path) -> None:
    run = make_run(tmp_path / "raft", raft_tree())
    write_rows(run, [step_row(step, "domain", **{"raft/lambda": 0.5 * step}) for step in (1, 2)])
    assert "λ of RAFT" in page_of(run)


def test_a_failed_run_shows_why(run: RunDir) -> None:
    write_rows(run, ROWS[:3])
    failure = {"node": 1, "what": "engine-0 ended", "when": 0.0, "detail": "CUDA out of memory"}
    write_end(run, 0, {"status": "failed", "message": "engine-0 ended", "failure": failure})
    page = page_of(run)
    assert '<span class="state failed">failed</span>' in page
    assert "last error: attempt 0 at step 0: engine-0 ended" in page
    assert "CUDA out of memory" in page


def test_a_torn_last_line_of_metrics_is_left_out(run: RunDir) -> None:
    write_rows(run, ROWS[:3])
    whole = page_of(run)
    with run.metrics_file.open("a") as stream:
        stream.write(json.dumps(ROWS[3])[:40])
    torn = page_of(run)
    assert torn.split("Written")[0] == whole.split("Written")[0]


def test_values_that_are_no_numbers_are_left_out_of_curves(run: RunDir) -> None:
    write_rows(run, [step_row(1, "general"), step_row(2, "general", loss=float("nan"))])
    assert "nan" not in page_of(run)


def test_rollouts_cut_short_are_left_out(run: RunDir) -> None:
    finished(run)
    write_rollouts(run, 1)
    run.rollout_file(1).write_bytes(run.rollout_file(1).read_bytes()[:100])
    assert "The run has no rollouts." in page_of(run)


def test_a_long_run_with_long_rollouts_has_a_page_of_bounded_size(run: RunDir) -> None:
    write_rows(run, [step_row(step, "general") for step in range(1, 3001)])
    for step in (1, 3000):
        write_rollouts(run, step, lengths=(5000,) * 20)
    page = page_of(run)
    assert "4680 more tokens" in page
    assert len(page) < 1_500_000


def test_the_diagnostics_of_refinement_are_in_a_frame(run: RunDir) -> None:
    finished(run)
    (run.report / "refinement.html").write_text(
        '<section>8 of 9</section><img src="refinement.png">'
    )
    (run.report / "refinement.png").write_bytes(b"png")
    page = page_of(run)
    (frame,) = re.findall(r'<iframe sandbox[^>]* srcdoc="([^"]*)"', page)
    inside = html.unescape(frame)
    assert "<section>8 of 9</section>" in inside
    assert 'src="data:image/png;base64,cG5n"' in inside
    assert_needs_nothing(page)
