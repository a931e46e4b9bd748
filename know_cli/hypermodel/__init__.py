"""KNOWN: the readable reference module, its bundles on disk, and the importer for Keras files."""

from know_cli.hypermodel.bundle import Bundle, load_bundle, save_bundle
from know_cli.hypermodel.known import Known, Preparation

__all__ = ["Bundle", "Known", "Preparation", "load_bundle", "save_bundle"]
