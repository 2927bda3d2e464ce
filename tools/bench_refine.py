"""Measure rewriting against vLLM's offline engine called directly, with the same prompts, in one run.

`python tools/bench_refine.py [CONFIG] [key=value ...] [--rounds N]` prints a table and writes JSON to
docs/measurements/. Both engines live in this process and take turns, so that a busy machine disturbs
them alike; the ratio is of the least seconds of each, by CPU and by the clock. The direct side is
`vllm.LLM.generate` with the sampling parameters of the rewriting, seeds included; its answers are
kept in memory only, where rewriting also renders prompts, checks its answers and saves them.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadistill.config import RefineConfig, load
from megadistill.data.records import Record
from megadistill.data.tokenizer import load_tokenizer
from megadistill.inference.engine import start_batch_engine
from megadistill.inference.requests import SamplingParams
from megadistill.inference.templates import load_template
from megadistill.refine.blocks import KEY, Blocks
from megadistill.refine.records import read_records
from megadistill.refine.rewriting import COLUMNS, FIELDS, Rewriter, rewrite_all
from megadistill.resolve import resolve
from megadistill.rollout.vllm_arguments import IN_PROCESS, EngineSettings, vllm_arguments

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.9


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "config", nargs="?", default=str(ROOT / "configs/embedded/raft_refine.yaml")
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--output", default=str(ROOT / "docs/measurements/refine.json"))
    options = parser.parse_args()
    config = load(RefineConfig, options.config, options.overrides)
    records, _ = read_records(config.input)
    sides = make_sides(config, records, gpu=options.gpu)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    tokens = {}
    for _ in range(options.rounds):
        for name, side in sides.items():
            clock, cpu = time.perf_counter(), time.process_time()
            tokens[name] = side()
            times[name].append((time.perf_counter() - clock, time.process_time() - cpu))
            print(f"{name}: {times[name][-1][0]:.2f} s, {times[name][-1][1]:.2f} CPU-s", flush=True)
    report(options.output, times, tokens, len(records))


def make_sides(
    config: RefineConfig, records: list[Record], *, gpu: bool
) -> dict[str, Callable[[], int]]:
    """The two ways, each a call that returns how many tokens it sampled."""
    settings, engine_config = config.rewrite, config.engine
    half = engine_config.memory_fraction / 2  # two engines lie side by side
    model = resolve("model", settings.model)
    rewriter = Rewriter(
        settings=settings,
        template=load_template(settings.template, FIELDS),
        tokenizer=load_tokenizer(model),
        seed=config.seed,
        date=config.date,
    )
    batch = EngineSettings(
        model=model,
        precision=settings.precision,
        max_model_len=settings.max_prompt_tokens + settings.max_tokens,
        gpu=gpu,
        limits=engine_config.model_copy(update={"memory_fraction": half}),
    )
    engine = start_batch_engine(batch)
    sampling = SamplingParams(
        temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_tokens
    )
    everything = range(len(records))
    labels = [{KEY: record.id} for record in records]

    def rewriting() -> int:
        with tempfile.TemporaryDirectory() as folder:
            blocks = Blocks(Path(folder), COLUMNS, labels, size=config.shards.block)
            figures = rewrite_all(
                rewriter, records, everything, blocks, engine=engine, sampling=sampling
            )
        return int(figures["tokens"])

    return {"vllm.LLM": make_direct(rewriter, batch, records), "megadistill refine": rewriting}


def make_direct(
    rewriter: Rewriter, batch: EngineSettings, records: list[Record]
) -> Callable[[], int]:
    """vLLM's own class, given every prompt at once."""
    # Not before the first engine has set the environment that vLLM reads when it is imported.
    import vllm  # noqa: PLC0415

    settings = rewriter.settings
    arguments = {**vllm_arguments(batch), **IN_PROCESS, "skip_tokenizer_init": False}
    direct = vllm.LLM(str(batch.model), **arguments)
    with tempfile.TemporaryDirectory() as folder:
        labels = [{KEY: record.id} for record in records]
        spare = Blocks(Path(folder), COLUMNS, labels, size=len(records))
        requests = list(rewriter.prompts(records, range(len(records)), spare))
    params = [
        vllm.SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            seed=request.seed,
        )
        for request in requests
    ]
    prompts = [{"prompt_token_ids": list(request.token_ids)} for request in requests]

    def generate() -> int:
        outputs = direct.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def report(
    file: str, times: dict[str, list[tuple[float, float]]], tokens: dict[str, int], count: int
) -> None:
    """Records and tokens per second, and the ratio that is the goal."""
    best = {
        name: [min(column) for column in zip(*found, strict=True)] for name, found in times.items()
    }
    direct, ours = best["vllm.LLM"], best["megadistill refine"]
    rates = {name: tokens[name] for name in best}
    values = {
        "records": count,
        "tokens": rates,
        "records_per_s": {name: count / found[0] for name, found in best.items()},
        "tokens_per_s": {name: rates[name] / found[0] for name, found in best.items()},
        "ratio_clock": direct[0] / ours[0],
        "ratio_cpu": direct[1] / ours[1],
        "goal": GOAL,
        "times": times,
    }
    Path(file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for name, rate in values["records_per_s"].items():
        print(f"{name}: {rate:.2f} records/s, {values['tokens_per_s'][name]:.0f} tokens/s")
    print(f"ratio: {values['ratio_clock']:.3f} by the clock, {values['ratio_cpu']:.3f} by CPU time")


if __name__ == "__main__":
    main()
