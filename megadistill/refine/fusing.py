"""Answer fusion, Eq. (4): a strong model writes, judges choose; one shard against its endpoints.

The story of a record is `fuse_record`; the rest keeps many under way and saves them.
"""

import asyncio
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa

from megadistill.config.refine import FusionConfig
from megadistill.data.records import Record
from megadistill.inference.chat import ChatError, ChatModel, Usage, run_each
from megadistill.inference.model_argument import ModelArgument
from megadistill.inference.requests import ChatRequest, SamplingParams, without_thinking
from megadistill.inference.serving import open_models
from megadistill.inference.templates import Template, load_template
from megadistill.launch.shards import Upstream
from megadistill.refine.blocks import KEY, Blocks, Row, RowNamer, read_blocks
from megadistill.refine.checking import Rules, rejection_reason
from megadistill.refine.records import PartArguments, load_records
from megadistill.refine.similarity import passes
from megadistill.rollout.seeds import seed_for

log = logging.getLogger(__name__)

FUSE_FIELDS = ("question", "answer", "rewrite")
JUDGE_FIELDS = ("question", "answer", "candidate")
PASSING = ("endpoint_failed", "endpoint_refused", "no_score")
"""Reasons that may pass: a record that has one is asked about again by the next call."""
ROUNDING = 1e-9
"""A mean of scores this little below the bar is at the bar."""
_SCORE = re.compile(
    r"<score>[\s*_`]*(\d+(?:\.\d*)?|\.\d+)(?:\s*/\s*(\d+))?[\s*_`]*</score>", re.IGNORECASE
)

_SCORES = pa.list_(pa.struct([("judge", pa.string()), ("score", pa.float64())]))
_CANDIDATE = pa.struct(
    [
        ("text", pa.string()),
        ("fault", pa.string()),
        ("scores", _SCORES),
        ("mean", pa.float64()),
    ]
)
_USAGE = pa.struct([("model", pa.string()), *((n, pa.int64()) for n in Usage.__slots__)])
COLUMNS = {
    "index": "int64",
    "fused": "string",
    "round": "int64",
    "reason": "string",
    "candidates": pa.list_(_CANDIDATE),
    "usage": pa.list_(_USAGE),
}
"""`round` counts from 1; `fused` is null where the original answer stays, then `reason` says why."""


class FuseArguments(PartArguments):
    """Some shards' rewrites, and the models that fuse and judge."""

    settings: FusionConfig
    templates: tuple[str, str]
    """Hashes of the files."""
    models: dict[str, ModelArgument]
    rules: Rules
    tau: float
    rewrites: Upstream
    similarities: Upstream
    seed: int

    @property
    def gpus(self) -> int:
        """Those of the models that it serves."""
        return sum(model.gpus for model in self.models.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One attempt at fusing and what the judges made of it."""

    text: str
    fault: str | None = None
    """Why it was not put before the judges."""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    """By judge; None: no score could be read."""

    @property
    def mean(self) -> float | None:
        """Mean over the judges that gave a score."""
        given = [score for score in self.scores.values() if score is not None]
        return math.fsum(given) / len(given) if given else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fuser:
    """Models, prompts and rules; the same for every record."""

    settings: FusionConfig
    models: Mapping[str, ChatModel]
    template: Template
    judge_template: Template
    rules: Rules
    seed: int = 0

    async def fuse_record(self, record: Record, rewrite: str) -> Row:
        """Up to R attempts, fewer when one is good enough; the best, or the original answer."""
        usage = {name: Usage() for name in (self.settings.model, *self.settings.judges)}
        candidates: list[Candidate] = []
        try:
            for number in range(self.settings.rounds):
                text, cut = await self._attempt(record, rewrite, number, usage)
                fault = "cut" if cut else rejection_reason(text, record.raw_answer, self.rules)
                scores = {} if fault else await self._judge(record, text, usage)
                candidates.append(Candidate(text=text, fault=fault, scores=scores))
                if good_enough(candidates[-1], self.settings.accept):
                    break
            reason = None
        except ChatError as error:
            reason = str(error)
        chosen = best(candidates)
        if chosen is None:
            reason = reason or ("all_faulty" if all(c.fault for c in candidates) else "no_score")
        return {
            "fused": None if chosen is None else candidates[chosen].text,
            "round": None if chosen is None else chosen + 1,
            "reason": reason if chosen is None else None,
            "candidates": [_candidate_row(candidate) for candidate in candidates],
            "usage": [{"model": name, **asdict(used)} for name, used in usage.items()],
        }

    async def _attempt(
        self, record: Record, rewrite: str, number: int, usage: Mapping[str, Usage]
    ) -> tuple[str, bool]:
        """One fused answer, and whether it was cut."""
        values = {"question": record.question, "answer": record.raw_answer, "rewrite": rewrite}
        request = ChatRequest(
            messages=self.template.fill(values),
            sampling=SamplingParams(
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                max_tokens=self.settings.max_tokens,
            ),
            seed=seed_for(self.seed, 1, record.id, number),
        )
        name = self.settings.model
        response = await self.models[name].ask(request, usage[name])
        return without_thinking(response.text), response.cut

    async def _judge(
        self, record: Record, candidate: str, usage: Mapping[str, Usage]
    ) -> dict[str, float | None]:
        """Every judge's score."""
        values = {"question": record.question, "answer": record.raw_answer, "candidate": candidate}
        requests = [
            ChatRequest(
                messages=self.judge_template.fill(values),
                sampling=SamplingParams(
                    temperature=self.settings.judge_temperature,
                    max_tokens=self.settings.judge_max_tokens,
                ),
                seed=seed_for(self.seed, 2, record.id, number),
            )
            for number in range(self.settings.judge_tries)
        ]

        async def score_of(name: str) -> float | None:
            try:
                reply = await self.models[name].ask_until_parsed(requests, parse_score, usage[name])
            except ChatError:
                return None
            return parse_score(reply)

        scores = await asyncio.gather(*(score_of(name) for name in self.settings.judges))
        return dict(zip(self.settings.judges, scores, strict=True))


def parse_score(text: str) -> float | None:
    """The last `<score>` of a judge's answer, None unless it is from 0 to 1, such as 0.8 or 8/10."""
    found = _SCORE.findall(without_thinking(text))
    if not found:
        return None
    number, of = found[-1]
    score = float(number) / max(int(of or 1), 1)
    return score if 0 <= score <= 1 else None


def good_enough(candidate: Candidate, accept: float) -> bool:
    """Whether no further attempt is needed; the bar itself is enough."""
    return candidate.mean is not None and candidate.mean >= accept - ROUNDING


def best(candidates: Sequence[Candidate]) -> int | None:
    """The candidate with the highest mean, of equals the earliest; None if none has one."""
    means = {n: mean for n, c in enumerate(candidates) if (mean := c.mean) is not None}
    return max(means, key=lambda n: (means[n], -n)) if means else None


def _candidate_row(candidate: Candidate) -> Row:
    scores = [{"judge": judge, "score": score} for judge, score in candidate.scores.items()]
    values = {"text": candidate.text, "fault": candidate.fault}
    return values | {"scores": scores, "mean": candidate.mean}


def fuse(directory: Path, arguments: FuseArguments) -> None:
    """The shard: fuses what passed the filter."""
    work = chosen_work(arguments)
    key_of = RowNamer(arguments)
    labels = [
        {"index": r.index, KEY: key_of(r.id, r.messages, r.raw_answer, rewrite)}
        for r, rewrite in work
    ]
    blocks = Blocks(directory, COLUMNS, labels, size=arguments.block)
    positions = blocks.missing()
    if not positions:
        return
    settings = arguments.settings
    configs = {name: model.config for name, model in arguments.models.items()}
    with open_models(configs, gpu=arguments.gpu, logs=directory) as models:
        fuser = Fuser(
            settings=settings,
            models=models,
            template=load_template(settings.template, FUSE_FIELDS),
            judge_template=load_template(settings.judge_template, JUDGE_FIELDS),
            rules=arguments.rules,
            seed=arguments.seed,
        )

        async def fuse_one(position: int) -> None:
            row = await fuser.fuse_record(*work[position])
            if blocks.add(position, row, failed=row["reason"] in PASSING):
                log.info("fusion: a block of %d records is saved", blocks.size)

        # As many at a time as keep the models busy.
        most = 2 * max(model.config.concurrency for model in models.values())
        run_each(fuse_one, positions, models.values(), most)


def chosen_work(arguments: FuseArguments) -> list[tuple[Record, str]]:
    """The records that have a rewrite which passed, with it; in order."""
    rewrites = read_blocks(arguments.rewrites.outputs)
    measured = read_blocks(arguments.similarities.outputs)
    records = load_records(arguments.records.path)
    return [
        (records[row["index"]], row["rewrite"])
        for row, found in zip(rewrites, measured, strict=True)
        if found["similarity"] is not None and passes(found["similarity"], arguments.tau)
    ]
