"""An evaluation from end to end, with a scripted engine and a scripted judge."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megadistill.cli import main
from megadistill.config import EvaluateConfig, parse
from megadistill.data.files import Longest
from megadistill.evaluate import generating, protocol
from megadistill.evaluate.benchmarks import read_items
from megadistill.evaluate.pipeline import Evaluation
from megadistill.rollout.vllm_arguments import EngineSettings
from tests.inference.scripted import Endpoint, Killed, ScriptedEngine, endpoint_tree
from tests.launch.in_process import shards_in_process
from tests.tiny import make_tokenizer, set_today, write_model_config

QUESTIONS = 12


def medqa_row(number: int) -> dict[str, Any]:
    options = {letter: f"{letter.lower()}{number}" for letter in "ABCD"}
    row = {"id": f"q{number}", "question": f"question {number} ?", "options": options}
    return row | {"answer_idx": "ABCD"[number % 4]}


@dataclass
class World:
    """Files, engine and judge of one evaluation."""

    path: Path
    engines: dict[str, ScriptedEngine]
    tree: dict[str, Any]
    runs: list[str] = field(default_factory=list)

    def run(self, **changes: Any) -> str:
        self.runs.clear()
        config = parse(EvaluateConfig, {**self.tree, **changes})
        with shards_in_process(self.runs):
            return Evaluation.of(config, gpu=False).run()

    def results(self, system: str, benchmark: str = "medqa") -> list[dict[str, Any]]:
        file = self.path / "runs" / "tiny" / "results" / system / f"{benchmark}.parquet"
        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
        return rows


def always(letter: str) -> Callable[[str], str]:
    return lambda prompt: f"<think> Final answer: D </think> so Final answer: {letter}"


def knowing(share: int) -> Callable[[str], str]:
    """Right wherever the question's number is below `share`."""

    def reply(prompt: str) -> str:
        number = int(re.findall(r"question (\d+) \?", prompt)[-1])
        return f"hm Final answer: {'ABCD'[(number + (number >= share)) % 4]}"

    return reply


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    rows = [medqa_row(number) for number in range(QUESTIONS)]
    file = tmp_path / "medqa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies = {"base": knowing(3), "better": knowing(11), "stubborn": always("A")}
    engines = {}
    for name, reply in replies.items():
        model = write_model_config(tmp_path / name, name=name)
        texts = [reply(f"question {n} ?") for n in range(QUESTIONS)]
        prompts = [f"question {n} ? A. a{n} B. b{n} C. c{n} D. d{n}" for n in range(QUESTIONS)]
        words = "Reason step by step, then end with a line `Final answer: <letter>`."
        tokenizer = make_tokenizer([*texts, *prompts, words])
        tokenizer.save_pretrained(model)
        engines[name] = ScriptedEngine(tokenizer, reply)

    def start(settings: EngineSettings) -> ScriptedEngine:
        return engines[settings.model.name]

    monkeypatch.setattr(generating, "start_batch_engine", start)
    systems = {
        name: {"kind": "serve", "path": str(tmp_path / name), "max_model_len": 96}
        for name in replies
    }
    tree = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "systems": systems,
        "benchmarks": {"medqa": {"path": str(file)}},
        "shards": {"block": 4, "count": 2},
    }
    return World(tmp_path, engines, tree)


def test_systems_are_scored_and_the_table_has_intervals(world: World) -> None:
    table = world.run()
    assert "| base | 25.0 [8.9, 53.2] |" in table
    assert "**91.7 [64.6, 98.5]" in table
    rows = world.results("stubborn")
    assert len(rows) == QUESTIONS
    assert {row["extracted"] for row in rows} == {"A"}
    assert json.loads(rows[0]["messages"])[0]["content"].startswith("question 0 ?")
    assert "<think>" in rows[0]["written"]
    summary = json.loads((world.path / "runs/tiny/results/better/summary.json").read_text())[
        "medqa"
    ]
    assert summary["items"] == 12
    assert summary["whole_set"] is False
    report = world.path / "runs/tiny/report"
    assert {f.name for f in report.iterdir()} == {
        f"table.{suffix}" for suffix in ("md", "csv", "tex", "html", "png")
    }
    found = list(csv.DictReader((report / "table.csv").open()))
    assert [row["system"] for row in found] == ["base", "better", "stubborn"]
    # McNemar: 8 answers changed, all for the better: 2 / 2^8; Holm doubles the smaller of two.
    assert float(found[1]["p_adjusted"]) == pytest.approx(2 * 2 / 2**8)
    assert [row["mark"] for row in found] == ["", "+", ""]


def test_a_repeated_call_runs_nothing_and_a_changed_setting_its_shards(world: World) -> None:
    first = world.run()
    assert len(world.runs) == 9
    assert world.run() == first
    assert world.runs == []
    world.run(benchmarks={"medqa": world.tree["benchmarks"]["medqa"] | {"limit": 6}})
    assert len(world.runs) == 9


def test_an_evaluation_keeps_the_day_on_which_it_began(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chat templates say the same after midnight, so that nothing is asked anew."""
    set_today(monkeypatch, "2026-03-01")
    world.run()
    set_today(monkeypatch, "2026-03-02")
    world.run()
    assert world.runs == []
    assert "date: '2026-03-01'" in (world.path / "runs/tiny/config.yaml").read_text()
    world.run(date="2026-03-02")
    assert len(world.runs) == 9


def test_a_killed_shard_goes_on_where_it_was(world: World) -> None:
    engine = world.engines["base"]
    engine.kill_at = 5
    with pytest.raises(Killed):
        world.run()
    engine.kill_at = None
    world.run()
    assert len(engine.prompts) == QUESTIONS + 1  # the fifth had been written, not saved


def test_several_samples_are_averaged_by_item(world: World) -> None:
    chosen = world.tree["benchmarks"]["medqa"] | {"samples": 3, "temperature": 1.0}
    world.run(benchmarks={"medqa": chosen})
    assert [row["sample"] for row in world.results("base")[:4]] == [0, 1, 2, 0]
    assert len(world.engines["base"].prompts) == 3 * QUESTIONS


def test_answers_without_room_are_no_score_and_not_an_error(world: World) -> None:
    systems = {"base": world.tree["systems"]["base"] | {"max_model_len": 8}}
    expected = "| base | no score, 12 of 12 answers have none: 12 prompt too long |"
    assert expected in world.run(systems=systems)
    world.run(systems=systems)
    assert world.runs == []
    assert {row["finish_reason"] for row in world.results("base")} == {"prompt_too_long"}


def test_results_of_several_runs_and_seeds_are_compared_by_the_command(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.run()
    results = world.path / "runs/tiny/results"
    words = [f"three={results}/better,{results}/base,{results}/better", f"{results}/stubborn"]
    output = world.path / "compared"
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--compare", f"{results}/base", *words, "--output", str(output)])
    assert ended.value.code == 0
    assert "| three | **69.4 [" in capsys.readouterr().out
    assert "three" in (output / "table.tex").read_text()
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--compare", str(world.path)])
    assert ended.value.code == 2
    assert "expected RUN/results/SYSTEM" in capsys.readouterr().err


def verify(number: int, body: dict[str, Any]) -> str:
    """Says yes where the response has the truth in it; its first reply to anything is no use."""
    if body["seed"] == 0:
        return "let me think"
    text = body["messages"][-1]["content"]
    truth = text.partition("<ground_truth_answer>")[2].split()[0]
    response = text.partition("<response>")[2].partition("</response>")[0]
    return f"<decision>{'yes' if f'answer: {truth}' in response else 'No'}</decision>"


@pytest.fixture
def judge() -> Iterator[Endpoint]:
    endpoint = Endpoint(verify)
    yield endpoint
    endpoint.stop()


def test_a_verifier_is_asked_again_and_decides(world: World, judge: Endpoint) -> None:
    rows = [
        {
            "Question": f"question {number} ?",
            "Correct Answer": f"a{number}",
            **{f"Incorrect Answer {k}": f"{'xbcd'[k]}{number}" for k in (1, 2, 3)},
        }
        for number in range(QUESTIONS)
    ]
    file = world.path / "gpqa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = {
        "kind": "gpqa_diamond",
        "path": str(file),
        "judge": "verifier",
        "samples": 2,
    }
    systems = {"stubborn": world.tree["systems"]["stubborn"]}
    settings = {"systems": systems, "benchmarks": {"gpqa": benchmark}}
    world.run(**settings, models={"verifier": endpoint_tree(judge.url)})
    found = world.results("stubborn", "gpqa")
    assert len(found) == 2 * QUESTIONS
    right = {row["item"] for row in found if row["value"] == 1.0}
    assert 0 < len(right) < QUESTIONS
    asked = [body["messages"][-1]["content"] for body in judge.bodies]
    assert "Final answer: D" not in asked[0]  # what was thought is not judged
    assert len(asked) == 2 * QUESTIONS  # both samples say the same: asked once, then again
    sampled = {(s.top_k, s.repetition_penalty) for s in world.engines["stubborn"].sampling}
    assert sampled == {(20, 1.05)}  # as GPQA's protocol says


def test_a_judge_that_fails_leaves_no_score_and_is_counted(world: World, judge: Endpoint) -> None:
    judge.script = lambda *_: (400, "too long")
    row = {"problem_idx": 1, "problem": "question 1 ?", "answer": "7"}
    (world.path / "hmmt.jsonl").write_text(json.dumps(row))
    benchmark = {"path": str(world.path / "hmmt.jsonl"), "judge": "v", "samples": 1}
    systems = {"base": world.tree["systems"]["base"]}
    table = world.run(
        systems=systems, benchmarks={"hmmt25": benchmark}, models={"v": endpoint_tree(judge.url)}
    )
    (found,) = world.results("base", "hmmt25")
    assert (found["value"], found["hole"]) == (0.0, "judge_endpoint_refused")
    assert "no score, 1 of 1 answers have none: 1 judge endpoint refused" in table


def test_what_an_official_evaluator_judged_stands_in_the_same_table(world: World) -> None:
    rows = [
        {"question_id": f"{task}{n}", "category": "math", "task": task, "score": n % 2}
        for task in "ab"
        for n in range(4)
    ]
    file = world.path / "ground_truth_judgment.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recorded = {"better": {"livebench": str(file)}}
    table = world.run(recorded=recorded)
    assert "| base | – | – | 25.0" in table  # noqa: RUF001
    assert "| better | 50.0 [" in table


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "\xff"}', "row 2 is not UTF-8"),
        (b'{"question', "row 2 is not JSON"),
        (b'["q"]', "row 2 is a list, expected an object"),
        (b'{"question": "' + b"x" * 9000 + b'"}', "row 2 is longer than"),
        (json.dumps(medqa_row(0)).encode(), "row 2 has the id 'q0' of row 1"),
        (json.dumps(medqa_row(1) | {"answer_idx": "E"}).encode(), "row 2 has the answer 'E'"),
    ],
)
def test_a_bad_row_of_a_benchmark_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str
) -> None:
    monkeypatch.setattr(protocol, "LONGEST", Longest(8192))
    file = tmp_path / "medqa.jsonl"
    file.write_bytes(json.dumps(medqa_row(0)).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=message):
        list(read_items("medqa", str(file)))


def test_what_cannot_work_is_said_before_any_work(world: World) -> None:
    benchmarks = {"gpqa_diamond": {"path": "./nowhere.csv"}}
    with pytest.raises(ValueError, match="accept its terms on the hub"):
        world.run(benchmarks=benchmarks)
    with pytest.raises(ValueError, match="Arena-Hard v2 HP needs a judge"):
        world.run(benchmarks={"arena_hard_hp": {}})
    with pytest.raises(ValueError, match="LiveBench 2024-11-25 is judged by its own command"):
        world.run(benchmarks={"livebench": {"path": "x"}})
    with pytest.raises(ValueError, match="expected one of ifeval"):
        world.run(benchmarks={"unknown": {"path": "x"}})
    assert world.runs == []
