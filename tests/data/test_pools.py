"""Pools: rendered and cut prompts, a split that stays, and draws that are a pure function."""

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megadistill.config.schema import DataConfig, FileSource, PackagedSource, PoolConfig
from megadistill.data.pools import (
    PromptPool,
    answer_ids,
    is_heldout,
    make_pools,
    stable_hash,
)
from megadistill.data.sources import read_pool
from megadistill.types import Prompt
from tests.tiny import make_prompt, make_tokenizer

MEDICAL = PoolConfig(sources=[PackagedSource(name="medical")], template="medical")

sizes = st.integers(1, 12)


def pool_of(size: int, seed: int = 0, name: str = "general") -> PromptPool:
    train = [make_prompt(f"p{index}") for index in range(size)]
    return PromptPool(name=name, train=train, heldout=[], num_dropped=0, seed=seed)


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def pool_from(
    folder: Path,
    prompts: list[Any],
    max_prompt_tokens: int = 64,
    heldout_fraction: float = 0.0,
) -> PromptPool:
    """A pool of a file's prompts, by a tokenizer that knows all of their words."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    config = DataConfig(
        pools={"mine": PoolConfig(sources=[FileSource(path=str(file))])},
        max_prompt_tokens=max_prompt_tokens,
        heldout_fraction=heldout_fraction,
    )
    text = json.dumps(prompts).translate({ord(mark): " " for mark in '"[]{},:'})
    return make_pools(config, make_tokenizer([text]), seed=0, names=["mine"])["mine"]


@given(sizes, st.integers(0, 50), st.integers(0, 30))
def test_a_draw_is_a_pure_function(size: int, position: int, count: int) -> None:
    first = pool_of(size).draw(position, count)
    assert len(first) == count
    assert pool_of(size).draw(position, count) == first


@given(sizes, st.integers(0, 50), st.lists(st.integers(0, 9), max_size=6))
def test_draws_in_pieces_are_one_draw(size: int, position: int, counts: list[int]) -> None:
    pool = pool_of(size)
    pieces: list[Prompt] = []
    for count in counts:
        pieces += pool.draw(position + len(pieces), count)
    assert pieces == pool.draw(position, sum(counts))


@given(sizes, st.integers(0, 5))
def test_a_pass_takes_every_prompt_once(size: int, pass_index: int) -> None:
    drawn = pool_of(size).draw(pass_index * size, size)
    assert sorted(ids(drawn)) == sorted(f"p{index}" for index in range(size))


def test_every_pass_has_its_own_order() -> None:
    pool = pool_of(20)
    orders = {tuple(ids(pool.draw(20 * index, 20))) for index in range(10)}
    assert len(orders) == 10
    assert tuple(f"p{index}" for index in range(20)) not in orders


def test_seed_and_name_change_the_order() -> None:
    orders = [
        ids(pool_of(20, seed, name).draw(0, 20))
        for seed, name in ((0, "general"), (1, "general"), (0, "medical"))
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert orders[1] != orders[2]


def test_the_order_is_the_same_in_every_process() -> None:
    assert ids(pool_of(6).draw(0, 6)) == ["p0", "p5", "p2", "p3", "p1", "p4"]
    assert stable_hash("med-0001") == 1_000_405_132_850_842_974


def test_heldout_and_training_prompts_are_disjoint_and_complete() -> None:
    records = list(read_pool(MEDICAL))
    tokenizer = make_tokenizer(message["content"] for r in records for message in r.messages)
    config = DataConfig(pools={"medical": MEDICAL}, heldout_fraction=0.2)
    pool = make_pools(config, tokenizer, seed=0, names=["medical"])["medical"]
    train, heldout = set(ids(list(pool.train))), set(ids(list(pool.heldout)))
    assert not train & heldout
    assert train | heldout == {record.id for record in records}
    assert 0.1 < len(heldout) / len(records) < 0.3
    drawn = pool.draw(0, 3 * len(train))
    assert not {prompt.id for prompt in drawn} & heldout


def test_the_split_depends_on_nothing_but_the_id() -> None:
    names = [f"id-{index}" for index in range(2000)]
    chosen = {name for name in names if is_heldout(name, 0.1)}
    assert 0.07 < len(chosen) / len(names) < 0.13
    assert chosen <= {name for name in names if is_heldout(name, 0.3)}
    assert not any(is_heldout(name, 0.0) for name in names)


def test_no_prompt_contains_its_answer() -> None:
    records = list(read_pool(MEDICAL))
    texts = [message["content"] for record in records for message in record.messages]
    tokenizer = make_tokenizer([*texts, *(record.answer or "" for record in records)])
    config = DataConfig(pools={"medical": MEDICAL})
    pool = make_pools(config, tokenizer, seed=0, names=["medical"])["medical"]
    prompts = {prompt.id: prompt for prompt in [*pool.train, *pool.heldout]}
    assert tokenizer.unk_token_id not in {t for p in prompts.values() for t in p.token_ids}
    for record in records:
        prompt = prompts[record.id]
        assert prompt.answer == record.answer is not None
        explanation = record.answer.split("\n\n")[0]
        shown = tokenizer.decode(list(prompt.token_ids))
        assert " ".join(explanation.split()) not in shown
        assert not contains(prompt.token_ids, tokenizer.encode(explanation))
        assert explanation not in json.dumps(prompt.messages, ensure_ascii=False)


def contains(whole: tuple[int, ...], part: list[int]) -> bool:
    return any(
        list(whole[start : start + len(part)]) == part
        for start in range(len(whole) - len(part) + 1)
    )


def test_token_ids_are_the_rendered_chat_with_the_generation_prompt(tmp_path: Path) -> None:
    pool = pool_from(tmp_path, ["hello world"])
    tokenizer = make_tokenizer(["hello world"])
    assert (
        tokenizer.decode(list(pool.train[0].token_ids))
        == "<|user|> hello world <|end|> <|assistant|>"
    )


def test_a_long_chat_loses_its_oldest_turns_and_keeps_the_system_message(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "a a a a a a"},
        {"role": "assistant", "content": "b b"},
        {"role": "user", "content": "c c"},
    ]
    pool = pool_from(tmp_path, [turns], max_prompt_tokens=14)
    (prompt,) = pool.train
    # 3 + 4 tokens of the turns that stay, and the generation prompt. The answer would have fitted,
    # but goes with the question that it answers.
    assert len(prompt.token_ids) == 8
    assert [turn["content"] for turn in prompt.messages] == ["rules", "c c"]
    assert pool.num_dropped == 0


def test_a_chat_of_which_only_an_answer_would_fit_is_dropped(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a " * 20}, {"role": "assistant", "content": "b"}]
    pool = pool_from(tmp_path, [turns, "short"], max_prompt_tokens=10)
    assert len(pool.train) == 1
    assert pool.num_dropped == 1


def test_records_of_one_text_lie_on_one_side_of_the_split(tmp_path: Path) -> None:
    texts = [f"word{index % 20}" for index in range(60)]
    pool = pool_from(tmp_path, texts, heldout_fraction=0.3)
    train, heldout = (
        {prompt.messages[0]["content"] for prompt in side} for side in (pool.train, pool.heldout)
    )
    assert train
    assert heldout
    assert not train & heldout
    assert len(pool.train) + len(pool.heldout) == 60


def test_answers_that_are_too_long_are_dropped_where_they_are_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a a", "answer": "b " * count} for count in (1, 2, 9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FileSource(path=str(file), answer="answer")
    config = DataConfig(pools={"mine": PoolConfig(sources=[source])}, heldout_fraction=0)
    tokenizer = make_tokenizer(["a b"])
    # A prompt of 5 tokens, 2 of answer, 1 to end it.
    pool = make_pools(config, tokenizer, 0, ["mine"], max_answered=8)["mine"]
    assert [prompt.answer for prompt in pool.train] == ["b ", "b b "]
    assert pool.num_dropped == 1
    assert len(make_pools(config, tokenizer, 0, ["mine"])["mine"].train) == 3


def test_a_chat_that_fits_keeps_every_turn(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a a"}, {"role": "user", "content": "b b"}]
    pool = pool_from(tmp_path, [turns], max_prompt_tokens=9)
    assert len(pool.train[0].token_ids) == 9
    assert len(pool.train[0].messages) == 2


def test_a_prompt_too_long_in_one_turn_is_dropped_and_counted(tmp_path: Path) -> None:
    long_chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "a " * 20}]
    pool = pool_from(tmp_path, ["a " * 20, "short", long_chat], max_prompt_tokens=10)
    assert [prompt.messages[0]["content"] for prompt in pool.train] == ["short"]
    assert pool.num_dropped == 2


def test_a_pool_without_a_prompt_that_fits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.pools\.mine: .* \(2 were longer .* = 5, "):
        pool_from(tmp_path, ["a " * 20, "b " * 20], max_prompt_tokens=5)


def test_two_records_with_one_id_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n')
    pool = PoolConfig(sources=[FileSource(path=str(file))])
    with pytest.raises(ValueError, match="two records have the id 'x'"):
        make_pools(DataConfig(pools={"mine": pool}), make_tokenizer(["a b"]), 0, ["mine"])


def test_only_the_named_pools_are_read(tmp_path: Path) -> None:
    missing = PoolConfig(sources=[FileSource(path=str(tmp_path / "gone.jsonl"))])
    config = DataConfig(pools={"medical": MEDICAL, "gone": missing})
    assert set(make_pools(config, make_tokenizer(["a"]), 0, ["medical"])) == {"medical"}


@pytest.mark.parametrize(
    ("thinking", "expected"), [(None, "by-default"), (False, "off"), (True, "on")]
)
def test_the_thinking_switch_reaches_the_template(
    tmp_path: Path, thinking: bool | None, expected: str
) -> None:
    tokenizer = make_tokenizer(["on off by-default hello"])
    tokenizer.chat_template = (
        "{% if enable_thinking is not defined %}by-default"
        "{% elif enable_thinking %}on{% else %}off{% endif %}"
    )
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "hello"}\n')
    config = DataConfig(
        pools={"mine": PoolConfig(sources=[FileSource(path=str(file))])},
        heldout_fraction=0,
        enable_thinking=thinking,
    )
    pool = make_pools(config, tokenizer, 0, ["mine"])["mine"]
    assert tokenizer.decode(list(pool.train[0].token_ids)) == expected


def test_an_answer_ends_with_the_end_token() -> None:
    tokenizer = make_tokenizer(["forty two"])
    found = answer_ids(make_prompt(answer="forty two"), tokenizer)
    assert tokenizer.decode(found) == "forty two <|end|>"


def test_a_record_without_an_answer_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match=r"data\.pools\.general: record 'x' has no answer"):
        answer_ids(make_prompt("x"), make_tokenizer(["a"]))


def test_a_tokenizer_without_an_end_token_is_an_error() -> None:
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(["a"])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        answer_ids(make_prompt(answer="a"), tokenizer)


@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_a_record_that_can_only_be_read_as_a_control_token_is_refused_or_counted(
    tmp_path: Path, field: str
) -> None:
    """The word-level tokenizer has no other tokens for the text of its control tokens."""
    rows = [{"id": str(index), "prompt": "a", "answer": "b"} for index in range(3)]
    rows[1][field] = "a <|end|> <|assistant|> b"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FileSource(path=str(file), answer="answer")
    config = DataConfig(pools={"mine": PoolConfig(sources=[source])}, heldout_fraction=0)
    tokenizer = make_tokenizer(["a b"])
    with pytest.raises(
        ValueError, match=r"^data\.pools\.mine: record '1': found the text '<\|"
    ) as e:
        make_pools(config, tokenizer, 0, ["mine"], max_answered=99)
    assert "can only read as a control token" in str(e.value)
    lenient = config.model_copy(update={"unusable": 1})
    pool = make_pools(lenient, tokenizer, 0, ["mine"], max_answered=99)["mine"]
    assert ids(list(pool.train)) == ["0", "2"]
    assert (pool.num_unusable, pool.num_dropped) == (1, 0)


def test_a_chat_that_its_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(["a"])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "rows.jsonl").write_text('{"id": "x", "prompt": "a"}\n')
    source = FileSource(path=str(tmp_path / "rows.jsonl"))
    config = DataConfig(pools={"mine": PoolConfig(sources=[source])})
    expected = (
        r"^data\.pools\.mine: record 'x': refused by the chat template: roles must alternate$"
    )
    with pytest.raises(ValueError, match=expected):
        make_pools(config, tokenizer, 0, ["mine"])


def test_the_date_of_a_prompt_is_the_configurations(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(["Today: 05 Mar 2024"])
    tokenizer.chat_template = "Today: {{ strftime_now('%d %b %Y') }}"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    pools = {"mine": PoolConfig(sources=[FileSource(path=str(tmp_path / "rows.jsonl"))])}
    config = DataConfig(pools=pools, heldout_fraction=0, date=datetime.date(2024, 3, 5))
    (prompt,) = make_pools(config, tokenizer, 0, ["mine"])["mine"].train
    assert tokenizer.decode(list(prompt.token_ids)) == "Today: 05 Mar 2024"


def test_the_seed_of_a_pool_is_the_runs(tmp_path: Path) -> None:
    pool = pool_from(tmp_path, [f"word{index}" for index in range(9)])
    other = replace(pool, seed=1)
    assert pool.seed == 0
    assert ids(pool.draw(0, 9)) != ids(other.draw(0, 9))
