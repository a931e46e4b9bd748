"""Data sets of pictures in folders, in the layouts that they are distributed in."""

from know_cli.lab.pictures.decoding import decoded_classes, decoded_pictures
from know_cli.lab.pictures.registry import PICTURE_SETS, find_pictures, found_pictures

__all__ = [
    "PICTURE_SETS",
    "decoded_classes",
    "decoded_pictures",
    "find_pictures",
    "found_pictures",
]
