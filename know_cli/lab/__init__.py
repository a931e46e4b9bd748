"""What meta-training, evaluation and the demonstration share: data, networks, fitting."""
