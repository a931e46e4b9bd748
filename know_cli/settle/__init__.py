"""The hyper-model for ordinary runs: an average that reads how the run went."""
