"""megadistill: on-policy distillation on Slurm with Megatron-Core and vLLM."""
