"""Megatron-Core models as this project uses them; nothing else imports Megatron or its engine.

Importing the package switches the compiler off where there is no GPU, and does so here because it
must precede the first import of Megatron, whose modules compile their fused functions at import.
"""

import os

import torch

if not torch.cuda.is_available():
    # Compiling takes minutes on a CPU and gains nothing; a value that the user set stands.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
