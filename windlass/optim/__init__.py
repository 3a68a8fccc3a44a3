"""Optimizers and learning-rate schedules, each usable in any training loop."""
