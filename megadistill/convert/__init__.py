"""Hugging Face and Megatron-Core weights: one table, streamed both ways, without Megatron."""
