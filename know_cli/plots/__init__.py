"""Pictures, one module each. Only here is matplotlib used, and only inside functions."""
