"""Near duplicates and benchmark items inside records."""

import random

import pytest

from megadistill.prepare.overlap import BenchmarkItems, NearDuplicates
from megadistill.refine.answer_measures import words_of

WORDS = [f"word{number}" for number in range(5000)]


def text_of(seed: int, length: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def test_a_copy_with_other_case_and_punctuation_is_no_news() -> None:
    known = NearDuplicates(n=5, threshold=0.8)
    assert known.is_new("What is the capital of France, and why?")
    assert not known.is_new("what is the CAPITAL of france and why")
    assert known.is_new("What is the capital of Peru, and why not?")


def test_a_text_with_one_word_changed_is_found_and_a_half_new_one_stays() -> None:
    known = NearDuplicates(n=5, threshold=0.8)
    assert known.is_new(text_of(1))
    changed = text_of(1).split()
    changed[3] = "other"
    assert not known.is_new(" ".join(changed))
    assert known.is_new(text_of(1, 60) + " " + text_of(2, 60))


def test_unrelated_texts_are_all_new() -> None:
    known = NearDuplicates(n=5, threshold=0.8)
    assert all(known.is_new(text_of(seed)) for seed in range(200))


def test_a_benchmarks_item_is_found_inside_a_longer_text() -> None:
    items = BenchmarkItems(n=13, least=8, share=0.2)
    items.add("medqa", [text_of(5, 40)])
    assert items.found_in(f"Consider this. {text_of(5, 40)} What now?") == "medqa"
    half = " ".join(text_of(5, 40).split()[10:30])
    assert items.found_in(f"{text_of(6)} {half} {text_of(7)}") == "medqa"
    assert items.found_in(text_of(8)) is None


def test_one_shared_sentence_of_many_is_no_item() -> None:
    items = BenchmarkItems(n=13, least=8, share=0.2)
    vitals = text_of(1, 15)
    items.add("medqa", [f"{text_of(2)} {vitals} {text_of(3)}"])
    assert items.found_in(f"{text_of(4)} {vitals} {text_of(5)}") is None


CHINESE = "一名四十五岁的男性患者因胸痛三小时入院、心电图显示下壁导联抬高、最可能的诊断是什么"
JAPANESE = "四十五歳の男性が三時間前からの胸の痛みで入院した。心電図で最も考えられる診断はどれか"
THAI = "ผู้ป่วยชายอายุสี่สิบห้าปีมาโรงพยาบาลด้วยอาการเจ็บหน้าอกสามชั่วโมง"


@pytest.mark.parametrize("item", [CHINESE, JAPANESE, THAI])
def test_an_item_without_blanks_between_its_words_is_found(item: str) -> None:
    items = BenchmarkItems(n=13, least=8, share=0.2)
    items.add("exam", [item, "诊断是什么"])
    assert items.found_in(f"请回答 {item}?谢谢。") == "exam"
    assert items.found_in(item[:-2] + "吗") == "exam"
    assert items.found_in(item[: len(item) // 4]) is None
    assert (
        items.found_in("患者女性、三十岁、因发热两天就诊、血常规检查白细胞升高、应首先考虑哪种疾病")
        is None
    )
    assert items.counts == {"exam": {"looked_for": 1, "too_short": 1}}


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, THAI])
def test_near_duplicates_without_blanks_between_words_are_found(text: str) -> None:
    known = NearDuplicates(n=5, threshold=0.6)
    assert known.is_new(text)
    assert not known.is_new(f"{text[:-1]}吗?")
    assert known.is_new(text[::-1])


def test_words_of_mixed_scripts_are_words_and_characters() -> None:
    assert words_of("The MRI显示L5椎间盘, très 한국어 단어 2カ") == [
        *("the", "mri", "显", "示", "l5", "椎", "间", "盘", "très", "한국어", "단어", "2", "カ")
    ]


def test_twelve_words_in_common_are_too_few_but_a_short_item_counts_whole() -> None:
    items = BenchmarkItems(n=13, least=8, share=0.2)
    items.add("long", [text_of(5, 40)])
    items.add("short", [text_of(9, 9), "too few words"])
    twelve = " ".join(text_of(5, 40).split()[10:22])
    assert items.found_in(f"{text_of(6)} {twelve} {text_of(7)}") is None
    assert items.found_in(f"so: {text_of(9, 9)}") == "short"
    assert items.found_in("these are too few words") is None


def test_near_duplicates_are_found_among_many_texts() -> None:
    known = NearDuplicates(n=5, threshold=0.8)
    texts = [text_of(seed).split() for seed in range(300)]
    assert all(known.is_new(" ".join(words)) for words in texts)
    changed = [[*words[:60], "other", *words[61:]] for words in texts]
    # 111 of 121 n-grams stay: a Jaccard similarity of 0.92.
    assert not any(known.is_new(" ".join(words)) for words in changed)
