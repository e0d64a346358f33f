"""Training: recipes, batches, the trainer."""
