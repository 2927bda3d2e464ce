"""Loads and checks the parts of a run, and restores its last checkpoint."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from megadistill import startup
from megadistill.algorithms import Algorithm, Supervised, make_algorithm
from megadistill.algorithms.raft import TEACHER_WORDS
from megadistill.collect import AnswerCollector, Collector, OnPolicyCollector, Sampler
from megadistill.config import ConfigError, RunConfig, resolve_path
from megadistill.convert.families import read_spec
from megadistill.data.manifest import manifest
from megadistill.data.pools import PromptPool, make_pools
from megadistill.evaluate.heldout import Heldout, Texts, answer_texts, teacher_texts
from megadistill.megatron.engine import Engine
from megadistill.metrics import MetricWriter
from megadistill.preflight import used_pools
from megadistill.publish.files import publish_files, published_at
from megadistill.resolve import resolve
from megadistill.rollout.client import EnginePool
from megadistill.rollout.protocol import teacher_version
from megadistill.rollout.seeds import seed_for
from megadistill.rundir import RunDir
from megadistill.state import RunState, restore, restore_ahead
from megadistill.types import Prompt, Rollout


@dataclass
class Parts:
    """The parts of a run on this rank; `metrics` and `sampler` are None except on rank 0."""

    run: RunDir
    config: RunConfig
    engine: Engine
    algorithm: Algorithm = field(init=False)
    collector: Collector = field(init=False)
    sampler: Sampler | None = None
    heldout: Heldout = field(default_factory=Heldout)
    metrics: MetricWriter | None = None
    published: int = 0
    """Version of the weights that the rollout engines hold; they start with the student's, 0."""

    def close(self) -> None:
        """Leave the other ranks and hand the metrics over."""
        self.engine.close()
        if self.metrics is not None:
            self.metrics.close()


def assemble(run: RunDir) -> tuple[Parts, RunState]:
    """Load models, data and engines; restore the newest whole checkpoint. Collective."""
    config = run.load_config()
    tokenizer = startup.common_tokenizer(config)
    pools = _read_pools(config, tokenizer)
    startup.check_pools(pools, config)
    engine = Engine(config)
    marks = manifest(config.data, tokenizer, pools)
    startup.check_data(run, config, marks, writes=engine.is_writer)
    state = restore(run, engine, config)
    parts = Parts(run=run, config=config, engine=engine)
    startup.check_vocabularies(config, pools, engine.read)
    if engine.is_writer:
        parts.metrics = MetricWriter(run.metrics_file, config.log, config.name, state.step)
        for line in startup.describe_run(run, pools):
            logging.info(line)
    parts.algorithm = algorithm = make_algorithm(config, tokenizer, state.algorithm)
    if engine.is_writer and config.rollout is not None:
        parts.sampler = _connect(run, config)
        if ahead := restore_ahead(run, state):
            parts.sampler.restore_pending(state.step, ahead)
    if isinstance(algorithm, Supervised):
        (pool,) = config.algorithm.pools.values()
        parts.collector = AnswerCollector(algorithm, pools[pool], tokenizer, state.cursors)
    else:
        if state.step == 0:
            for branch in {own.teacher: own for own in algorithm.branches.values()}.values():
                startup.check_equal_start(config, branch, pools, engine.score)
        parts.collector = OnPolicyCollector(
            algorithm, pools, engine, parts.sampler, state.cursors, config.batch.responses
        )
    parts.heldout = _heldout(parts, pools, tokenizer)
    if parts.published != state.step:
        publish_student(parts, state.step)
    return parts, state


def publish_student(parts: Parts, version: int) -> None:
    """Stream the student to the running engines, which echo version and checksum. Collective.

    Nothing to do without engines, or where answers are trained on: engines then sample the student
    at its start alone. Waits for rollouts that are under way.
    """
    if parts.config.rollout is None or not parts.config.algorithm.needs_rollouts:
        return
    tensors = parts.engine.hf_tensors()
    if parts.sampler is None:
        for _ in tensors:
            raise AssertionError("only rank 0 receives tensors")
    else:
        parts.sampler.wait_pending()
        parts.sampler.publish(version, publish_files(tensors, parts.run.weights, version))
    parts.published = version
    parts.engine.barrier()


def _read_pools(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, PromptPool]:
    """The pools that the run reads; where answers are trained on, those that fit with theirs."""
    names, longest = used_pools(config), longest_answered(config)
    return make_pools(config.data, tokenizer, config.seed, names, max_answered=longest)


def longest_answered(config: RunConfig) -> int | None:
    """Tokens of the longest prompt with its answer that is trained on; None without answers.

    The student reads both. RAFT's teacher reads the prompt, its own or another's answer, a few words
    around them, and a response. Raises `ConfigError` when responses leave no room for that.
    """
    algorithm = config.algorithm
    if algorithm.longest_answered is None:
        return None
    longest = min(algorithm.longest_answered, _context(config.student.path))
    if not algorithm.answers_in_context:
        return longest
    assert config.rollout is not None
    (teacher,) = algorithm.teachers.values()
    context = _context(config.teachers[teacher].path)
    room = context - config.rollout.max_tokens - TEACHER_WORDS
    if room <= 0:
        raise ConfigError(
            f"rollout.max_tokens: found {config.rollout.max_tokens}, which leaves no room for prompt "
            f"and answer in the context of teachers.{teacher}, {context}"
        )
    return min(longest, room // algorithm.answers_in_context)


def _context(path: str) -> int:
    return read_spec(resolve("model", path)).max_positions


def _connect(run: RunDir, config: RunConfig) -> Sampler:
    assert config.rollout is not None
    engines = EnginePool.connect(run, config.rollout)
    return Sampler(
        engines,
        seed=config.seed,
        num_steps=config.steps,
        look_ahead=config.rollout.max_staleness > 0,
        colocated=config.rollout.placement == "colocated",
    )


def _heldout(
    parts: Parts, pools: Mapping[str, PromptPool], tokenizer: PreTrainedTokenizerBase
) -> Heldout:
    """What the configuration wants measured."""
    evaluate = parts.config.evaluate
    if not evaluate.every:
        return Heldout()
    texts = _teacher_texts(parts, pools) if evaluate.heldout else {}
    return Heldout(
        texts=texts | answer_texts(evaluate.answers, pools, tokenizer),
        teachers={name: config.teacher for name, config in evaluate.heldout.items()},
    )


def _teacher_texts(parts: Parts, pools: Mapping[str, PromptPool]) -> Texts:
    """Sample the teachers' held-out answers once; leaves the last teacher in the engines."""
    config = parts.config

    def sample(teacher: str, prompts: Sequence[Prompt], max_tokens: int) -> list[Rollout]:
        path = resolve_path(config.teachers[teacher].path)
        if path == resolve_path(config.student.path):
            version = 0
        else:
            version = teacher_version(list(config.teachers).index(teacher))
        rollouts: list[Rollout] = []
        if parts.sampler is not None:
            if parts.published != version:
                parts.sampler.publish(version, published_at(resolve("model", path)))
            seeds = [seed_for(config.seed, version, prompt.id) for prompt in prompts]
            rollouts = parts.sampler.generate(prompts, seeds, max_tokens)
        parts.published = version
        return parts.engine.broadcast(rollouts)

    file = parts.run.path / "state" / "heldout.json"
    return teacher_texts(config.evaluate.heldout, pools, file, sample, parts.engine)
