"""A trained student in Hugging Face format is the same model to transformers, vLLM and our engine."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.algorithms.protocol import response_span
from megadistill.convert.hf_files import writing_model
from megadistill.losses import policy_gradient
from megadistill.megatron.engine import STUDENT, Engine
from megadistill.types import Sample, TokenSpan
from tests.megatron.ranks import run_config
from tests.rollout.test_vllm import PROMPTS, running
from tests.rollout.tiny_models import oracle_logprobs, qwen2, save

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.megatron,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


def sample(seed: int) -> Sample:
    ids_N = np.random.default_rng(seed).integers(3, 500, 40, dtype=np.int32)
    weights_R = np.full(20, 0.05, dtype=np.float32)
    span = TokenSpan(token_ids_N=ids_N, num_scored=20)
    return Sample(span=span, weights_R=weights_R)


def test_an_exported_student_is_one_model_to_all_three(tmp_path: Path) -> None:
    start, exported = save(qwen2(0), tmp_path / "start"), tmp_path / "exported"
    engine = Engine(run_config(start, {}))
    before = engine.score(STUDENT, [sample(9).span])[0]
    engine.step([sample(0), sample(1)], policy_gradient, learning_rate=1e-2)
    with writing_model(exported) as writer:
        for name, tensor in engine.hf_tensors():
            writer.write(name, tensor)
        writer.copy_metadata(start)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    student = {"path": str(exported)}
    with running(tmp_path, model, precision="fp32", student=student) as engines:
        rollouts = engines.generate(prompts=PROMPTS[:6])
    ours = engine.score(STUDENT, [response_span(rollout) for rollout in rollouts])
    moved = engine.score(STUDENT, [sample(9).span])[0]
    engine.close()
    assert np.abs(moved - before).max() > 0.01  # the step that was exported did something
    for rollout, ours_R in zip(rollouts, ours, strict=True):
        np.testing.assert_allclose(rollout.logprobs_R, ours_R, atol=1e-4)
        np.testing.assert_allclose(oracle_logprobs(model, rollout).numpy(), ours_R, atol=1e-4)
