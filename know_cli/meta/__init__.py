"""KNOWN's meta-training: windows from recorded trajectories, fitting, held-out scores."""
