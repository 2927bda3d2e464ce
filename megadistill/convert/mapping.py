"""The table between Megatron parameters and Hugging Face tensors, and how each is sharded.

A row names one Megatron parameter, the tensors it is made of, and a `Layout` that merges, splits
and shards. Everything is bit-exact and keeps the dtype. The "full" Megatron tensor of a row is what
one rank without tensor parallelism holds; `{i}` stands for the layer number.

Shape legend: V vocabulary, H hidden, D head_dim, Q = heads x D, K = kv_heads x D, A = Q + 2 K,
F feed-forward, G = 2 F.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from megadistill.convert.families import ModelSpec, check_tp

Read = Callable[[str], torch.Tensor]
"""Returns the Hugging Face tensor of that name."""


class Layout(Protocol):
    """How the tensors of one row become a full Megatron tensor, and that one becomes shards."""

    def merge(self, spec: ModelSpec, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hugging Face tensors to the full Megatron tensor."""

    def split(self, spec: ModelSpec, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inverse of `merge`; drops the rows that pad the vocabulary."""

    def shard(self, full: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
        """What tensor-parallel rank `rank` of `tp` holds; may be a view."""

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """Inverse of `shard` over all ranks in order; rows that pad the vocabulary remain."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """One tensor, the same on every rank."""

    def merge(self, spec: ModelSpec, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return parts[0]

    def split(self, spec: ModelSpec, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (full,)

    def shard(self, full: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
        return full

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return shards[0]


@dataclass(frozen=True, slots=True)
class Sharded(Replicated):
    """One tensor, cut in equal pieces along `dim`."""

    dim: int = 0

    def shard(self, full: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
        return _piece(full, tp, rank, self.dim)

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(tuple(shards), self.dim)


@dataclass(frozen=True, slots=True)
class Vocabulary(Sharded):
    """[V, H], cut along V after zero rows made its length a multiple of the ranks."""

    def split(self, spec: ModelSpec, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (full[: spec.vocab_size],)

    def shard(self, full: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
        rows = -(-full.shape[0] // tp)
        piece = full[rank * rows : (rank + 1) * rows]
        if missing := rows - piece.shape[0]:
            piece = torch.cat([piece, piece.new_zeros(missing, full.shape[1])])
        return piece


@dataclass(frozen=True, slots=True)
class QueryKeyValue(Sharded):
    """[Q, ...], [K, ...], [K, ...] interleaved: each kv head's queries, then its key and value."""

    def merge(self, spec: ModelSpec, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        groups = [part.reshape(spec.num_kv_heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(groups, 1).flatten(0, 1)

    def split(self, spec: ModelSpec, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        queries = spec.num_heads // spec.num_kv_heads * spec.head_dim
        groups = full.reshape(spec.num_kv_heads, -1, *full.shape[1:])
        borders = (queries, queries + spec.head_dim)
        return tuple(piece.flatten(0, 1) for piece in groups.tensor_split(borders, 1))


@dataclass(frozen=True, slots=True)
class GateUp:
    """Gate [F, H] above up [F, H]; a rank holds its piece of the gate above its piece of up."""

    def merge(self, spec: ModelSpec, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(tuple(parts))

    def split(self, spec: ModelSpec, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return full.chunk(2)

    def shard(self, full: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
        if tp == 1:
            return full
        return torch.cat([_piece(half, tp, rank, 0) for half in full.chunk(2)])

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row: a Megatron parameter, the Hugging Face tensors it holds, and their layout."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    dims: str
    """Shape of the full Megatron tensor, one letter of `_size` a dimension."""

    def at(self, layer: int) -> "Entry":
        """The row of one layer, its pattern filled in."""
        names = tuple(name.format(i=layer) for name in self.hf)
        return replace(self, megatron=self.megatron.format(i=layer), hf=names)

    def shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """Shape of the full Megatron tensor."""
        return tuple(_size(spec, letter) for letter in self.dims)


def _size(spec: ModelSpec, letter: str) -> int:
    return {
        "V": spec.vocab_size,
        "H": spec.hidden_size,
        "D": spec.head_dim,
        "Q": spec.num_heads * spec.head_dim,
        "A": (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim,
        "F": spec.ffn_size,
        "G": 2 * spec.ffn_size,
    }[letter]


_EMBEDDING = Entry(
    megatron="embedding.word_embeddings.weight",
    hf=("model.embed_tokens.weight",),
    layout=Vocabulary(),
    dims="VH",
)
_FINAL_NORM = Entry(
    megatron="decoder.final_layernorm.weight",
    hf=("model.norm.weight",),
    layout=Replicated(),
    dims="H",
)
_OUTPUT = Entry(
    megatron="output_layer.weight", hf=("lm_head.weight",), layout=Vocabulary(), dims="VH"
)


def _layer(dims: str, layout: Layout, megatron: str, *hf: str) -> Entry:
    return Entry(
        megatron=f"decoder.layers.{{i}}.{megatron}",
        hf=tuple(f"model.layers.{{i}}.{name}" for name in hf),
        layout=layout,
        dims=dims,
    )


def _qkv(dims: str, kind: str) -> Entry:
    parts = [f"self_attn.{name}_proj.{kind}" for name in "qkv"]
    return _layer(dims, QueryKeyValue(), f"self_attention.linear_qkv.{kind}", *parts)


def _norm(dims: str, megatron: str, hf: str) -> Entry:
    return _layer(dims, Replicated(), megatron, f"{hf}.weight")


_LAYER = (
    _norm("H", "self_attention.linear_qkv.layer_norm_weight", "input_layernorm"),
    _qkv("AH", "weight"),
    _layer("HQ", Sharded(1), "self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    _norm("H", "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm"),
    _layer("GH", GateUp(), "mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    _layer("HF", Sharded(1), "mlp.linear_fc2.weight", "mlp.down_proj.weight"),
)
_QKV_BIAS = (_qkv("A", "bias"),)
_QK_NORM = (
    _norm("D", "self_attention.q_layernorm.weight", "self_attn.q_norm"),
    _norm("D", "self_attention.k_layernorm.weight", "self_attn.k_norm"),
)


def layer_entries(spec: ModelSpec) -> tuple[Entry, ...]:
    """The rows of one transformer layer, with `{i}` in their names."""
    bias = _QKV_BIAS if spec.qkv_bias else ()
    norm = _QK_NORM if spec.qk_norm else ()
    return (*_LAYER, *bias, *norm)


def outer_entries(spec: ModelSpec) -> tuple[Entry, ...]:
    """The rows outside the layers; with tied embeddings there is no output layer of its own."""
    return (_EMBEDDING, _FINAL_NORM) if spec.tied_embeddings else (_EMBEDDING, _FINAL_NORM, _OUTPUT)


def entries(spec: ModelSpec) -> Iterator[Entry]:
    """Every row of the model, with global layer numbers, in the order of the forward pass."""
    yield _EMBEDDING
    for layer in range(spec.num_layers):
        for entry in layer_entries(spec):
            yield entry.at(layer)
    yield from outer_entries(spec)[1:]


def hf_names(spec: ModelSpec) -> tuple[str, ...]:
    """Names of all tensors of the Hugging Face model."""
    return tuple(name for entry in entries(spec) for name in entry.hf)


def check_names(spec: ModelSpec, names: Sequence[str]) -> None:
    """Raise `ValueError` unless `names` are the model's tensors, neither more nor fewer.

    A stored head of a tied model and the frequency buffers of old checkpoints may be there.
    """
    expected = set(hf_names(spec))
    missing = sorted(expected.difference(names))
    extra = sorted(
        name
        for name in set(names) - expected
        if name not in _OUTPUT.hf and not name.endswith("rotary_emb.inv_freq")
    )
    if missing or extra:
        raise ValueError(
            f"not the tensors of a {spec.family} model of {spec.num_layers} layers: "
            f"{len(missing)} missing {missing[:3]}, {len(extra)} unexpected {extra[:3]}"
        )


def load_shard(  # noqa: PLR0913 - a rank's place takes five values
    spec: ModelSpec,
    read: Read,
    *,
    tp: int,
    tp_rank: int,
    layers: range,
    first: bool,
    last: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of one rank, one at a time: (local Megatron name, this rank's tensor).

    `layers` are the global numbers of this pipeline stage's layers; local names count from 0.
    `first` and `last` tell whether the stage holds the embedding and the output layer. With tied
    embeddings a last stage that is not the first gets its output layer from the embedding.
    Raises `ValueError` when `tp` does not divide the model or a tensor has not its shape.
    """
    check_tp(spec, tp)
    for entry, name in _stage_entries(spec, layers, first=first, last=last):
        yield name, entry.layout.shard(merged(spec, entry, read), tp, tp_rank)


def merged(spec: ModelSpec, entry: Entry, read: Read) -> torch.Tensor:
    """The full Megatron tensor of a row. Raises `ValueError` when it has not the spec's shape."""
    full = entry.layout.merge(spec, [read(name) for name in entry.hf])
    if full.shape != entry.shape(spec):
        raise ValueError(
            f"{', '.join(entry.hf)}: found {tuple(full.shape)} together, "
            f"expected {entry.shape(spec)} by config.json"
        )
    return full


def to_hf(
    spec: ModelSpec, megatron_name: str, full: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and tensors held by one full Megatron tensor (global layer number).

    Drops vocabulary padding. A tied model's `output_layer.weight` yields nothing, its embedding
    says it all. Raises `ValueError` for a name that is not in the table.
    """
    if spec.tied_embeddings and megatron_name == _OUTPUT.megatron:
        return
    entry = find_entry(spec, megatron_name)
    yield from zip(entry.hf, entry.layout.split(spec, full), strict=True)


def find_entry(spec: ModelSpec, megatron_name: str) -> Entry:
    """The row of a Megatron parameter with its global layer number.

    Raises `ValueError` for a name that the model does not have.
    """
    pattern, layer = megatron_name, 0
    if megatron_name.startswith("decoder.layers."):
        _, _, number, rest = megatron_name.split(".", 3)
        pattern, layer = f"decoder.layers.{{i}}.{rest}", int(number)
    for entry in (*layer_entries(spec), *outer_entries(spec)):
        if entry.megatron == pattern and layer < spec.num_layers:
            return entry.at(layer)
    raise ValueError(
        f"{megatron_name}: no such parameter in a {spec.family} model of {spec.num_layers} layers"
    )


def _stage_entries(
    spec: ModelSpec, layers: range, *, first: bool, last: bool
) -> Iterator[tuple[Entry, str]]:
    """The rows of one pipeline stage, each with its local Megatron name."""
    if first:
        yield _EMBEDDING, _EMBEDDING.megatron
    for local, layer in enumerate(layers):
        for entry in layer_entries(spec):
            yield entry.at(layer), entry.megatron.format(i=local)
    if last:
        yield _FINAL_NORM, _FINAL_NORM.megatron
    if last and not (spec.tied_embeddings and first):
        yield _EMBEDDING if spec.tied_embeddings else _OUTPUT, _OUTPUT.megatron


def _piece(full: torch.Tensor, tp: int, rank: int, dim: int) -> torch.Tensor:
    size = full.shape[dim] // tp
    return full.narrow(dim, rank * size, size)
