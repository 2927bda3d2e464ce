"""The Hugging Face model families: shapes, read from `config.json` and checked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.resolve import read_settings

# Values of a `config.json` are whatever JSON holds, hence Any; they are checked as they are read.
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama-3 frequency scaling of the rotary embedding."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything that decides a model's parameters and their meaning."""

    family: str
    """Name in `FAMILIES`."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    """Rows of the embedding in the Hugging Face model, before padding for tensor parallelism."""
    max_positions: int
    rms_norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: RopeScaling | None = None

    @property
    def num_parameters(self) -> int:
        """Numbers in the model, biases and the scales of norms included."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (queries + keys)
        attention += self.qkv_bias * (queries + 2 * keys) + self.qk_norm * 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + embeddings + self.hidden_size

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_key_value_heads: found {self.num_kv_heads}, "
                f"expected a divisor of num_attention_heads = {self.num_heads}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a family fixes in code rather than in `config.json`, and its defaults there."""

    name: str
    """`model_type` in `config.json`."""
    qkv_bias: bool
    qk_norm: bool
    default_head_dim: int | None = None
    """Absent: hidden_size / num_attention_heads."""


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(name="llama", qkv_bias=False, qk_norm=False),
        Family(name="qwen2", qkv_bias=True, qk_norm=False),
        Family(name="qwen3", qkv_bias=False, qk_norm=True, default_head_dim=128),
    )
}

_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "dual_chunk_attention_config": None,
}
"""Settings that only one value of is implemented; a missing key has it."""


def read_spec(model_dir: str | Path) -> ModelSpec:
    """The shape of the model in `model_dir`, from its `config.json`.

    Reads the rotary settings both as `rope_parameters` (transformers 5) and as `rope_theta` with
    `rope_scaling` (before). Raises one `ValueError` with every key that we do not support.
    """
    file = Path(model_dir) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file, expected a Hugging Face model directory")
    config = read_settings(file)
    try:
        return parse_spec(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def parse_spec(config: Json) -> ModelSpec:
    """The shape that a decoded `config.json` describes; errors as in `read_spec`."""
    if config.get("model_type") not in FAMILIES:
        found = config.get("model_type")
        raise ValueError(f"model_type: found {found!r}, expected one of {sorted(FAMILIES)}")
    if problems := [*_problems(config)]:
        raise ValueError("; ".join(problems))
    family = FAMILIES[config["model_type"]]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    rope = _rope(config)
    return ModelSpec(
        family=family.name,
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or family.default_head_dim or hidden // heads,
        ffn_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope),
    )


def padded_vocab(spec: ModelSpec, tp: int) -> int:
    """Rows of the embedding over `tp` ranks: the smallest multiple of `tp` that holds them all."""
    return -(-spec.vocab_size // tp) * tp


def check_tp(spec: ModelSpec, tp: int) -> None:
    """Raise `ValueError` when `tp` ranks cannot share the model's heads and feed-forward rows."""
    sizes = {"num_key_value_heads": spec.num_kv_heads, "intermediate_size": spec.ffn_size}
    for key, size in sizes.items():
        if size % tp:
            raise ValueError(f"tp: found {tp}, expected a divisor of {key} = {size}")


def _problems(config: Json) -> Iterator[str]:
    """One line for each key whose value we cannot honour."""
    for key in _REQUIRED:
        if not isinstance(config.get(key), int):
            yield f"{key}: found {config.get(key)!r}, expected a whole number"
    for key, expected in _FIXED.items():
        if config.get(key, expected) != expected:
            yield f"{key}: found {config[key]!r}, expected {expected!r}"
    if layers := _sliding_layers(config):
        yield f"{layers}, expected full attention in every layer"
    yield from _rope_problems(config)


def _sliding_layers(config: Json) -> str | None:
    """How the configuration asks for windowed attention in some layer, if it does."""
    if kinds := config.get("layer_types"):
        other = sorted(set(kinds) - {"full_attention"})
        return f"layer_types: found {other}" if other else None
    # Qwen's have a switch for the window; where a family has none, a window is one.
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    first = config.get("max_window_layers", 0)
    if window is not None and first < config.get("num_hidden_layers", 0):
        return f"sliding_window: found {window} for layers from {first}"
    return None


def _rope(config: Json) -> Json:
    """The rotary settings in transformers 5's form: rope_theta, rope_type and its numbers."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {**rope, "rope_type": kind, "rope_theta": theta}


def _rope_problems(config: Json) -> Iterator[str]:
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = _rope(config)
    if nested := sorted(name for name, value in rope.items() if isinstance(value, dict)):
        yield f"{key}: found separate settings for {nested}, expected one for all layers"
    elif rope["rope_type"] not in ("default", "llama3"):
        yield f"{key}.rope_type: found {rope['rope_type']!r}, expected 'default' or 'llama3'"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        found = rope["partial_rotary_factor"]
        yield f"{key}.partial_rotary_factor: found {found}, expected 1.0"
    elif rope["rope_type"] == "llama3":
        for name in _LLAMA3_KEYS:
            if not isinstance(rope.get(name), int | float):
                yield f"{key}.{name}: found {rope.get(name)!r}, expected a number"


_LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def _rope_scaling(rope: Json) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )
