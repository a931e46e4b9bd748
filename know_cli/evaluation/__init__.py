"""Downstream tasks, and what predicted weights are worth as a start on them."""
