"""How fast the engine is on this machine, against named baselines in the same run."""
