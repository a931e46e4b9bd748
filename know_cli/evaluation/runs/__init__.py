"""``know eval --trajectory run``: what averages of an ordinary run's checkpoints are worth."""
