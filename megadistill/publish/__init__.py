"""Publishing: from the trainer's tensors to files that a running engine loads."""
