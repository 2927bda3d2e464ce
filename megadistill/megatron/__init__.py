"""Megatron-Core models as this project uses them; nothing else imports Megatron or its engine.

Importing the package imports Megatron-Core, because two things must be settled first: where there
is no GPU nothing is compiled, and what Megatron finds missing is not worth a dozen warnings.
"""

import importlib
import os
import warnings

import torch

if not torch.cuda.is_available():
    # Megatron compiles its fused functions as it is imported. That takes minutes on a CPU and gains
    # nothing; a value that the user set stands.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

with warnings.catch_warnings():
    # That apex and, on a CPU, Transformer Engine are not installed.
    warnings.simplefilter("ignore")
    for _name in ("models.gpt.gpt_layer_specs", "optimizer", "dist_checkpointing"):
        importlib.import_module(f"megatron.core.{_name}")
