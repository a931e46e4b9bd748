"""Data sets that trajectories are recorded on, behind one interface; nothing is downloaded."""

from know_cli.lab.data.augmentations import AFFINE, AUGMENTATIONS, UNCHANGED
from know_cli.lab.data.glyphs import render_glyphs
from know_cli.lab.data.registry import DATA_SETS, available, load
from know_cli.lab.data.samples import DataSet, Samples, standardise
from know_cli.lab.data.source import Source

__all__ = [
    "AFFINE",
    "AUGMENTATIONS",
    "DATA_SETS",
    "UNCHANGED",
    "DataSet",
    "Samples",
    "Source",
    "available",
    "load",
    "render_glyphs",
    "standardise",
]
