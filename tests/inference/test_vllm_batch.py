"""The bulk engine, in a process of its own, against transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.rollout.tiny_models import EOS, llama, save

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = [list(range(5, 9 + number)) for number in range(12)]
SCRIPT = """
import json, sys
from pathlib import Path
import torch  # before the engine's variables are set, as a tokenizer does
torch.set_num_threads(2)
from megadistill.config.refine import EngineConfig
from megadistill.inference.engine import start_batch_engine
from megadistill.inference.requests import BatchRequest, SamplingParams
from megadistill.rollout.vllm_arguments import EngineSettings
prompts = json.loads(sys.argv[2])
settings = EngineSettings(
    model=Path(sys.argv[1]),
    precision="fp32",
    max_model_len=96,
    gpu=False,
    limits=EngineConfig(max_num_seqs=2),
)
engine = start_batch_engine(settings)
requests = (BatchRequest(key=n, token_ids=ids, seed=n) for n, ids in enumerate(prompts))
sampling = SamplingParams(max_tokens=12)
answers = {r.key: [list(r.token_ids), r.finish_reason] for r in engine.generate(requests, sampling)}
nll = engine.mean_nll([(ids, 3) for ids in prompts])
engine.close()
print(json.dumps({"answers": answers, "nll": nll, "threads": torch.get_num_threads()}))
"""


def test_answers_and_likelihoods_match_transformers(tmp_path: Path) -> None:
    model = llama(0)
    directory = save(model, tmp_path / "model")
    command = [sys.executable, "-c", SCRIPT, str(directory), json.dumps(PROMPTS)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["threads"] == 1
    assert sorted(map(int, found["answers"])) == list(range(len(PROMPTS)))
    for number, prompt in enumerate(PROMPTS):
        ids, reason = found["answers"][str(number)]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ids
        assert reason == ("stop" if ids[-1] == EOS else "length")
        scored = logits[len(prompt) - 4 : len(prompt) - 1]
        expected = -scored.gather(1, torch.tensor(prompt[-3:])[:, None]).mean()
        assert found["nll"][number] == pytest.approx(float(expected), abs=1e-4)
