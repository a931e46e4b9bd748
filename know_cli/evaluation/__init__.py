"""Downstream tasks, and what a predicted start is worth on them."""
