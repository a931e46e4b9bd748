"""A zoo of small classifiers, from whose training KNOWN is meta-trained.

Their layers and the names of their parameters are those of networks in use, their cost is that
of a few milliseconds a step on one core.

>>> import numpy as np
>>> design = random_design("resnet", Inputs("image", (3, 32, 32)), 10, np.random.default_rng(0))
>>> model = build(design, seed=0)

A new architecture is one more file like ``cnn.py``, and its line in ``registry.py``.
"""

from know_cli.lab.zoo.design import Architecture, Design, Inputs
from know_cli.lab.zoo.registry import ARCHITECTURES, build, random_design

__all__ = ["ARCHITECTURES", "Architecture", "Design", "Inputs", "build", "random_design"]
