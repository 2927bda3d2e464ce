"""Prompts and sequences: sources, pools, templates, packing."""
