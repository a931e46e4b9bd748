"""The floor that forgetting, meta-training and evaluation stand on: data, networks, fitting."""
