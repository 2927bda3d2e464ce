"""IF-Eval against the official functions, called the way the official script calls them."""

import json
import random
from pathlib import Path

import pytest

from megadistill.evaluate.benchmarks import get_benchmark, read_items
from megadistill.evaluate.benchmarks.ifeval import checker, score
from megadistill.evaluate.protocol import Item, benchmark_file

pytest.importorskip("eval_framework")

FILLERS = (
    "The answer is short. It has two sentences, and a comma!",
    "THIS IS ALL IN CAPITALS. AND DR. SMITH AGREES.\n\n* one\n* two\n* three\n\nP.S. the end",
    'all lower case, <<a title>>\n\n***\n\n"quoted" [place] [name] [date]\nIs there anything else?',
    '{"answer": "json", "number": 7}',
    "**Bold** first line\n\nSECTION 1\nText here. More text here.\nSECTION 2\nEnd.\n\nHope it helps",
)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return list(read_items("ifeval", "packaged"))


def response_to(item: Item, number: int) -> str:
    """A response that follows some of the instructions: it takes words out of the prompt."""
    words = item.text.split()
    middle = " ".join(words[: 20 + 7 * (number % 30)])
    return f"{FILLERS[number % len(FILLERS)]}\n{middle}" if number % 11 else ""


def test_the_packaged_file_is_the_whole_official_set(items: list[Item]) -> None:
    assert len(items) == get_benchmark("ifeval").size
    assert sum(len(item.reference["instructions"]) for item in items) == 834


def test_four_scores_are_exactly_the_official_ones(items: list[Item]) -> None:
    answers = {item.text: response_to(item, number) for number, item in enumerate(items)}
    details = [score(item, answers[item.text]).details for item in items]
    sums = {name: sum(found[name] for found in details) for name in details[0]}
    ours = {f"prompt_{mode}": sums[f"prompt_{mode}"] / 541 for mode in ("strict", "loose")}
    for mode in ("strict", "loose"):
        ours[f"instruction_{mode}"] = sums[f"instructions_{mode}"] / sums["instructions"]
    official = checker()
    file = benchmark_file(get_benchmark("ifeval"), "packaged")
    expected = {}
    for mode in ("strict", "loose"):
        judge = getattr(official, f"test_instruction_following_{mode}")
        outputs = []
        for example in official.read_prompt_list(file):
            random.seed(0)  # one checker draws a letter where its own is none
            outputs.append(judge(example, answers))
        assert len(outputs) == 541
        expected[f"prompt_{mode}"] = sum(o.follow_all_instructions for o in outputs) / 541
        followed = sum(sum(o.follow_instruction_list) for o in outputs)
        expected[f"instruction_{mode}"] = followed / 834
    assert ours == expected
    assert 0.05 < ours["prompt_strict"] < ours["prompt_loose"] < ours["instruction_loose"] < 0.7


def test_sentences_are_counted_without_a_download() -> None:
    kwargs = [{"num_sentences": 3, "relation": "less than"}]
    row = {
        "key": 1,
        "prompt": "write",
        "instruction_id_list": ["length_constraints:number_sentences"],
        "kwargs": kwargs,
    }
    item = get_benchmark("ifeval").rows(row)
    assert item is not None
    assert score(item, "Dr. Smith, the head of the U.S. team, came at noon. He left.").value == 1.0
    assert score(item, "One. Two. Three.").value == 0.0


def test_rows_with_nulls_as_the_hub_has_them_are_read(tmp_path: Path) -> None:
    row = {"key": 7, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"kwargs": [{"num_words": None}]}))
    (item,) = read_items("ifeval", str(tmp_path / "a.jsonl"))
    assert score(item, "no comma here").value == 1.0
    assert score(item, "one, two").value == 0.0
