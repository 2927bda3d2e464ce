"""megadistill: on-policy distillation on Slurm with Megatron-Core and vLLM."""

__version__ = "0.2.0"
