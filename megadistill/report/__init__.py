"""For people: rollouts, progress, tables and pictures."""
