"""RAFT's stage 1: raw answers are rewritten, filtered by meaning, and fused with the rewrites."""
