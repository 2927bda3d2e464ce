"""Hugging Face and Megatron-Core weights: one table, streamed both ways, without Megatron."""

from megadistill.convert.families import ModelSpec, RopeScaling, check_tp, padded_vocab, read_spec
from megadistill.convert.hf_files import SafetensorsReader, SafetensorsWriter, resolve_model
from megadistill.convert.mapping import load_shard, to_hf

__all__ = [
    "ModelSpec",
    "RopeScaling",
    "SafetensorsReader",
    "SafetensorsWriter",
    "check_tp",
    "load_shard",
    "padded_vocab",
    "read_spec",
    "resolve_model",
    "to_hf",
]
