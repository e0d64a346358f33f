"""Checkpoints of other projects become models: one file for each."""
