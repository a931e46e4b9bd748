"""Pictures, one module each. They import matplotlib inside functions only."""
