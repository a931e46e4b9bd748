"""A zoo of small classifiers; recordings of their training are what KNOWN learns from.

Their layers and parameter names are those of common networks, and a training step takes a few
milliseconds on one core.

>>> import numpy as np
>>> design = random_design("resnet", Inputs("image", (3, 32, 32)), 10, np.random.default_rng(0))
>>> model = build(design, seed=0)

To add an architecture, write a file like ``cnn.py`` and a line in ``registry.py``.
"""

from know_cli.lab.zoo.design import Architecture, Design, Inputs
from know_cli.lab.zoo.registry import ARCHITECTURES, build, random_design

__all__ = ["ARCHITECTURES", "Architecture", "Design", "Inputs", "build", "random_design"]
