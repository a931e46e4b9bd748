"""Callbacks for trainers: they keep the last checkpoints of a run, and record what comes after.

:mod:`know_cli.callbacks.transformers` is for Hugging Face's Trainer,
:mod:`know_cli.callbacks.lightning` for Lightning; each needs its library, which is an extra of the
same name. Nothing is imported here.
"""
