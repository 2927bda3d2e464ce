"""What people look at: rollouts, progress, tables and pictures."""
