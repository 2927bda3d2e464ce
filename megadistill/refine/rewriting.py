"""Self-conditioned rewriting, Eq. (1): one shard through one vLLM engine."""

import datetime
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megadistill.config.refine import EngineConfig, RewriteConfig
from megadistill.config.rows import Message
from megadistill.data.records import Record
from megadistill.data.tokenizer import answer_opening, chat_ids, load_tokenizer, special_tokens
from megadistill.inference.engine import BatchEngine, start_batch_engine
from megadistill.inference.requests import (
    BatchRequest,
    SamplingParams,
    open_thought,
    without_thinking,
)
from megadistill.inference.templates import Template, load_template
from megadistill.launch.shards import Runtime
from megadistill.refine.blocks import KEY, Blocks, Row, RowNamer, add_figures
from megadistill.refine.checking import Rules, rejection_reason
from megadistill.refine.records import PartArguments
from megadistill.resolve import resolve
from megadistill.rollout.seeds import seed_for
from megadistill.rollout.vllm_arguments import EngineSettings

log = logging.getLogger(__name__)

FIELDS = ("question", "answer")
COLUMNS = {
    "index": "int64",
    "id": "string",
    "rewrite": "string",
    "reason": "string",
    "written": "string",
    "num_tokens": "int64",
}
"""`rewrite` is null where there is no usable one, then `reason` says why; `written` is what the
model wrote in every case."""


class RewriteArguments(PartArguments):
    """A part of the records, and the model that writes their answers anew."""

    settings: RewriteConfig
    template: str
    """Hash of the file."""
    model: str
    """Hash of the files."""
    date: datetime.date | None
    """Of the chat template."""
    seed: int
    engine: Runtime[EngineConfig]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriter:
    """What turns records into prompts, and the model's tokens into rows."""

    settings: RewriteConfig
    template: Template
    tokenizer: PreTrainedTokenizerBase
    seed: int
    date: datetime.date | None

    def prompts(
        self, records: Sequence[Record], positions: Sequence[int], blocks: Blocks
    ) -> Iterator[BatchRequest]:
        """A request for each record that can be rewritten; the others' rows go to their blocks."""
        specials = special_tokens(self.tokenizer)
        for position in positions:
            record = records[position]
            reason = record.problem or _special(record, specials)
            token_ids: list[int] = []
            if reason is None:
                chat = rewrite_chat(record, self.template)
                token_ids = chat_ids(chat, self.tokenizer, date=self.date)
                if len(token_ids) > self.settings.max_prompt_tokens:
                    reason = "prompt_too_long"
            if reason is None:
                seed = seed_for(self.seed, 0, record.id)
                yield BatchRequest(key=position, token_ids=token_ids, seed=seed)
            else:
                blocks.add(position, row(reason=reason))

    def finish(self, record: Record, token_ids: Sequence[int], finish_reason: str) -> Row:
        """The row of a record that was rewritten."""
        # The method is typed for batches too, whose result would be a list.
        written = str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))
        text = without_thinking(open_thought(answer_opening(self.tokenizer), written))
        if self.template.has_opening:
            text = f"{self.template.turns[-1]['content']} {text}"
        fault: str | None = "cut"
        if finish_reason != "length":
            fault = rejection_reason(text, record.raw_answer, rules_of(self.settings))
        values = {"written": written, "num_tokens": len(token_ids)}
        return row(reason=fault, rewrite=None if fault else text, **values)


def rules_of(settings: RewriteConfig) -> Rules:
    """The reject list of the configuration."""
    return Rules(
        phrases=settings.reject_phrases,
        openings=settings.reject_openings,
        check_final_answer=settings.check_final_answer,
    )


def rewrite_chat(record: Record, template: Template) -> list[Message]:
    """The chat with its last turn replaced by the template's; earlier turns stay."""
    values = {"question": record.messages[-1]["content"], "answer": record.raw_answer}
    return [*record.messages[:-1], *template.fill(values)]


def row(*, reason: str | None, **values: Any) -> Row:
    """A row of this stage, but for what its label says."""
    return {"rewrite": None, "written": None, "num_tokens": 0, "reason": reason} | values


def _special(record: Record, specials: Sequence[str]) -> str | None:
    """A text that the tokenizer would take for the end of a turn would break the template."""
    texts = [record.raw_answer, *(turn["content"] for turn in record.messages)]
    found = any(special in text for text in texts for special in specials)
    return "special_tokens" if found else None


def rewrite(directory: Path, arguments: RewriteArguments) -> None:
    """The shard: rewrites what its directory lacks."""
    settings = arguments.settings
    records = arguments.read()
    key_of = RowNamer(arguments)
    labels = [
        {"index": r.index, "id": r.id, KEY: key_of(r.id, r.messages, r.raw_answer, r.problem)}
        for r in records
    ]
    blocks = Blocks(directory, COLUMNS, labels, size=arguments.block)
    positions = blocks.missing()
    if not positions:
        return
    model = resolve("model", settings.model)
    rewriter = Rewriter(
        settings=settings,
        template=load_template(settings.template, FIELDS),
        tokenizer=load_tokenizer(model),
        seed=arguments.seed,
        date=arguments.date,
    )
    engine = start_batch_engine(
        EngineSettings(
            model=model,
            precision=settings.precision,
            max_model_len=settings.max_prompt_tokens + settings.max_tokens,
            gpu=arguments.gpu,
            limits=arguments.engine,
        )
    )
    sampling = SamplingParams(
        temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_tokens
    )
    figures = rewrite_all(rewriter, records, positions, blocks, engine=engine, sampling=sampling)
    engine.close()
    add_figures(directory, figures)
    log.info("rewriting: %s", json.dumps(figures))


def rewrite_all(
    rewriter: Rewriter,
    records: Sequence[Record],
    positions: Sequence[int],
    blocks: Blocks,
    *,
    engine: BatchEngine,
    sampling: SamplingParams,
) -> dict[str, float]:
    """Rewrite the records at these positions into their blocks; returns counts and seconds."""
    begun, num_tokens = time.monotonic(), 0
    requests = rewriter.prompts(records, positions, blocks)
    for response in engine.generate(requests, sampling):
        finished = rewriter.finish(
            records[response.key], response.token_ids, response.finish_reason
        )
        num_tokens += len(response.token_ids)
        if blocks.add(response.key, finished):
            log.info("rewriting: a block of %d records is saved", blocks.size)
    seconds = time.monotonic() - begun
    return {"records": len(positions), "tokens": num_tokens, "seconds": seconds}
