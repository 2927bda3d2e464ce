"""Measurements of a student that no training step sees."""
