"""Models that answer: vLLM's engine in this process, models served beside it, models elsewhere."""
