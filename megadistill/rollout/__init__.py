"""Rollouts: vLLM engines in processes of their own, and the client that samples through them."""
