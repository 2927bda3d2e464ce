"""Real vLLM engines in processes of their own, against transformers."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from megadistill.publish.files import publish_files
from megadistill.rollout import wire
from megadistill.rollout.client import EnginePool
from megadistill.rollout.connection import EngineError
from megadistill.rundir import RunDir
from megadistill.types import Prompt, Rollout
from tests.rollout.fakes import prompt, wait_until
from tests.rollout.tiny_models import (
    EOS,
    llama,
    oracle_logits,
    oracle_logprobs,
    published_tensors,
    qwen2,
    sampled,
    save,
)
from tests.tiny import camopd_tree, make_config

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

CONTEXT = 96
MAX_TOKENS = 60
PROMPTS = [prompt(*range(5, 10 + index)) for index in range(24)]
SEEDS = [1000 + index for index in range(24)]


@dataclass(frozen=True)
class Running:
    """Engines that are up, the run they belong to, and the weights they hold."""

    pool: EnginePool
    run: RunDir
    model: PreTrainedModel
    processes: list[subprocess.Popen[bytes]]

    def generate(self, version: int = 0, prompts: Sequence[Prompt] = PROMPTS) -> list[Rollout]:
        return self.pool.generate(prompts, SEEDS[: len(prompts)], expected_version=version)

    def publish(self, model: PreTrainedModel, version: int) -> None:
        published = publish_files(published_tensors(model), self.run.weights, version)
        self.pool.publish(version, published.files, published.checksum)
        for engine in self.pool.engines:
            health = engine.health()
            assert (health.version, health.checksum) == (version, published.checksum)


@contextmanager
def running(directory: Path, model: PreTrainedModel, **changes: Any) -> Iterator[Running]:
    """Start the engines of a run on `model`; `changes` go into the run's configuration.

    A student among them lies on disk already; otherwise `model` is saved to be it.
    """
    rollout = {"max_tokens": MAX_TOKENS, "max_model_len": CONTEXT, "max_num_seqs": 32}
    tree = camopd_tree(
        runs_dir=str(directory),
        student=changes.pop("student", None) or {"path": str(save(model, directory / "model"))},
        rollout=rollout | changes.pop("rollout", {}),
        **changes,
    )
    config = make_config(tree)
    assert config.rollout is not None
    run = RunDir.of(config)
    run.create(config)
    run.begin_attempt()
    processes = []
    try:
        for index in range(config.rollout.engines):
            command = [sys.executable, "-m", "megadistill.rollout.vllm_server", str(run.path)]
            with run.log_file(f"engine-{index}", 0).open("wb") as log:
                processes.append(
                    subprocess.Popen([*command, "--index", str(index)], stdout=log, stderr=log)
                )
        pool = EnginePool.connect(run, config.rollout)
        yield Running(pool, run, model, processes)
        pool.shutdown()
        assert [process.wait(60) for process in processes] == [0] * len(processes)
        assert not run.engine_file(0).exists()
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two engines of an untied Llama in fp32, weights version 0."""
    directory = tmp_path_factory.mktemp("llama")
    with running(directory, llama(0), precision="fp32", rollout={"engines": 2}) as started:
        yield started


def differences(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> torch.Tensor:
    """|log mu - log pi| of every sampled token."""
    return torch.cat(
        [
            (torch.from_numpy(rollout.logprobs_R) - oracle_logprobs(model, rollout)).abs()
            for rollout in rollouts
        ]
    )


def contents(rollouts: Sequence[Rollout]) -> list[tuple[list[int], list[float], str]]:
    return [
        (rollout.response_ids_R.tolist(), rollout.logprobs_R.tolist(), rollout.finish_reason)
        for rollout in rollouts
    ]


def test_sampled_logprobs_are_those_of_transformers(engines: Running) -> None:
    rollouts = engines.generate()
    assert [rollout.prompt for rollout in rollouts] == PROMPTS
    found = differences(engines.model, rollouts)
    assert len(found) > 500
    assert found.mean() < 1e-5
    assert found.max() < 1e-4


def test_the_same_seeds_give_the_same_rollouts_and_other_seeds_others(engines: Running) -> None:
    first = contents(engines.generate())
    assert contents(engines.generate()) == first
    others = engines.pool.generate(PROMPTS, [seed + 1 for seed in SEEDS], expected_version=0)
    assert all(one != other for one, other in zip(contents(others), first, strict=True))


def test_engines_in_different_processes_give_the_same_rollouts(engines: Running) -> None:
    each = [
        EnginePool((engine,), engines.pool.config).generate(PROMPTS, SEEDS, expected_version=0)
        for engine in engines.pool.engines
    ]
    assert contents(each[0]) == contents(each[1])


def test_a_response_ends_with_its_end_token_or_at_the_cap(engines: Running) -> None:
    rollouts = engines.generate()
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        ids = rollout.response_ids_R.tolist()
        stopped = rollout.finish_reason == "stop"
        assert ids.count(EOS) == int(stopped)
        assert (ids[-1] == EOS) if stopped else (len(ids) == MAX_TOKENS)


def test_a_long_prompt_gets_what_is_left_of_the_context(engines: Running) -> None:
    prompts = [prompt(*[7] * (CONTEXT - 1)), prompt(*[7] * (CONTEXT - 3))]
    rollouts = engines.generate(prompts=prompts)
    assert [len(rollout.response_ids_R) for rollout in rollouts] == [1, 3]
    assert {rollout.finish_reason for rollout in rollouts} == {"length"}
    assert differences(engines.model, rollouts).max() < 1e-4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (prompt(*[7] * CONTEXT), "found a prompt of 96 tokens, expected fewer than"),
        (prompt(5, 512), "found token id 512, expected 0 to 511"),
        (prompt(5, -1), "found token id -1"),
    ],
)
def test_impossible_prompts_are_refused_and_the_engine_goes_on(
    engines: Running, bad: Prompt, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        engines.generate(prompts=[PROMPTS[0], bad])
    assert len(engines.generate(prompts=PROMPTS[:2])) == 2


def test_logprobs_are_those_of_the_distribution_that_was_sampled(engines: Running) -> None:
    settings = engines.pool.config.model_copy(
        update={"temperature": 0.7, "top_p": 0.9, "top_k": 20}
    )
    pool = EnginePool(engines.pool.engines, settings)
    for rollout in pool.generate(PROMPTS[:4], SEEDS[:4], expected_version=0):
        logits_RV = oracle_logits(engines.model, rollout) / 0.7
        ordered_RV, order_RV = logits_RV.sort(descending=True)
        ordered_RV[:, 20:] = -torch.inf
        above_RV = ordered_RV.softmax(-1).cumsum(-1) - ordered_RV.softmax(-1)
        ordered_RV[above_RV > 0.9] = -torch.inf
        expected_RV = torch.empty_like(logits_RV).scatter(1, order_RV, ordered_RV.log_softmax(-1))
        found_R = torch.from_numpy(rollout.logprobs_R)
        torch.testing.assert_close(found_R, sampled(expected_RV, rollout), atol=1e-4, rtol=0)


def test_an_abandoned_batch_leaves_no_trace_in_the_next(engines: Running) -> None:
    before = contents(engines.generate())
    requests = [
        wire.Request(id=index, token_ids=list(prompt.token_ids), seed=seed, max_tokens=8)
        for index, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True))
    ]
    sampling = wire.Sampling(temperature=1.0, top_p=1.0, top_k=0)
    body = wire.Generate(requests=requests, sampling=sampling, version=0)
    for engine in engines.pool.engines:
        answer = iter(engine.ask("/generate", body, idle_s=60, total_s=60))
        assert isinstance(next(answer), wire.Sequence)
        del answer  # closes the connection
    assert contents(engines.generate()) == before


def test_a_file_that_is_not_there_is_refused_and_the_weights_stay(engines: Running) -> None:
    before = contents(engines.generate())
    with pytest.raises(EngineError, match=r"version 7: no such file: /nowhere\.safetensors"):
        engines.pool.publish(7, [Path("/nowhere.safetensors")], "0")
    assert contents(engines.generate()) == before


def test_published_weights_replace_the_old_ones_completely(engines: Running) -> None:
    old = contents(engines.generate())
    changed = llama(1)
    engines.publish(changed, 1)
    rollouts = engines.generate(version=1)
    assert {rollout.policy_version for rollout in rollouts} == {1}
    assert differences(changed, rollouts).max() < 1e-4
    engines.publish(engines.model, 0)
    assert contents(engines.generate()) == old


def test_a_tied_head_follows_its_embedding_and_bf16_repeats_bit_for_bit(tmp_path: Path) -> None:
    with running(tmp_path, qwen2(0), precision="bf16") as engine:
        assert contents(engine.generate()) == contents(engine.generate())
        assert differences(engine.model, engine.generate()).mean() < 0.05
        changed = qwen2(1)
        engine.publish(changed, 1)
        rollouts = engine.generate(version=1)
        assert differences(changed, rollouts).mean() < 0.05
        assert contents(rollouts) == contents(engine.generate(version=1))


def test_weights_that_lack_a_tensor_end_the_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"lack 1 parameters.*norm"):  # noqa: PT012, SIM117
        with running(tmp_path, llama(0), precision="fp32") as engine:
            tensors = dict(published_tensors(engine.model))
            del tensors["model.norm.weight"]
            published = publish_files(tensors.items(), engine.run.weights, 1)
            try:
                engine.pool.publish(1, published.files, published.checksum)
            finally:
                wait_until(lambda: engine.processes[0].poll() is not None, 60)
                assert engine.processes[0].returncode == 1
                assert not engine.run.engine_file(0).exists()
