"""Bundles of the methods' hyper-models: which method reads one, where it is, and what is in it.

Nothing heavy is imported here until a bundle is opened.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from know_cli.checkpoints.json_text import MAX_BYTES, BadJsonError, parse_json
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.errors import UsageError
from know_cli.files import read_bytes
from know_cli.known.shipped import MANIFEST, is_path
from know_cli.methods.registry import (
    DEFAULT_METHOD,
    DEFAULT_METHODS,
    METHODS,
    HyperModelBundle,
    Method,
    find_method,
)


def default_method(kind: TrajectoryKind | None, weights: str | None = None) -> str:
    """The method where none is named.

    Args:
        kind: of the checkpoints; None is a forgetting.
        weights: a bundle that is named, which tells that a hyper-model is wanted, and which.

    >>> default_method(TrajectoryKind.RUN)
    'average'
    >>> default_method(TrajectoryKind.FORGETTING, "retrodiction")
    'known'
    """
    if weights is None:
        return DEFAULT_METHODS[kind or TrajectoryKind.FORGETTING]
    return method_of_bundle(weights).name


def method_of_bundle(weights: str) -> Method:
    """The method that reads the bundle, or the family of bundles, of this name or path.

    That is the one whose hyper-model the manifest names, and KNOWN where it names none or there is
    nothing to read: whether the bundle can be used is for :func:`open_bundle` to say.
    """
    if not is_path(weights):
        return find_method(DEFAULT_METHOD)
    manifest = Path(weights) / MANIFEST
    if not manifest.exists():
        manifest = min(Path(weights).glob(f"*/{MANIFEST}"), default=manifest)
    try:
        model = parse_json(read_bytes(manifest, MAX_BYTES)).get("model")
    except (OSError, BadJsonError, AttributeError):
        model = None
    named = [method for method in METHODS if method.reads_bundle and method.hyper_model == model]
    return named[0] if named else find_method(DEFAULT_METHOD)


def check_weights(method: Method, weights: str | None) -> None:
    """Refuse a name that cannot be a bundle of a method's hyper-model.

    Raises:
        UsageError: the method reads no bundle (the message lists those that do), or there is none
            of that name.
    """
    if weights is None:
        return
    if method.hyper_model is None:
        readers = ", ".join(other.name for other in METHODS if other.reads_bundle)
        raise UsageError(
            f"--weights {weights}: --method {method.name} reads no KNOWN; leave it out, or take "
            f"one of {readers}"
        )
    _shipped(method).check_weights_name(weights)


def open_bundle(method: Method, weights: str | None, checkpoints: int) -> HyperModelBundle | None:
    """Load the bundle of a method's hyper-model; None for methods that read none.

    Args:
        method: the method that reads it.
        weights: name of a shipped family, or a path; None is the hyper-model's default.
        checkpoints: S.

    Raises:
        UsageError: there is no bundle of that name.
        CheckpointError: it is damaged, or there is none for that number of checkpoints.

    >>> open_bundle(find_method("known"), "continuation", 5).checkpoints
    5
    """
    if method.hyper_model is None:
        return None
    return load_bundle(method, find_bundle(method, weights, checkpoints))


def find_bundle(method: Method, weights: str | None, checkpoints: int) -> Path:
    """The folder of the bundle that a method with a hyper-model would open.

    Raises:
        UsageError: there is no bundle of that name.
        CheckpointError: there is none for that number of checkpoints.
    """
    path: Path = _shipped(method).find_bundle(weights, checkpoints)
    return path


def load_bundle(method: Method, path: Path) -> HyperModelBundle:
    """Load a bundle of a method's hyper-model.

    Raises:
        CheckpointError: it is damaged.
    """
    bundle: HyperModelBundle = _bundles(method).load_bundle(path)
    return bundle


def bundle_with_digest(
    method: Method, digest: str, weights: str | None, checkpoints: int
) -> str | None:
    """Find the bundle with a digest, among the shipped ones or at ``weights``.

    Returns:
        Its folder; None if there is none with that digest.

    Raises:
        UsageError: there is no bundle of that name.
        CheckpointError: it is damaged, or there is none for that number of checkpoints.
    """
    if method.hyper_model is None:
        return None
    shipped = _shipped(method)
    if weights is None:
        paths = [sizes[checkpoints] for sizes in shipped.shipped().values() if checkpoints in sizes]
    else:
        paths = [find_bundle(method, weights, checkpoints)]
    found = (path for path in paths if load_bundle(method, path).digest == digest)
    # Absolute, since a path has to look like one to be taken for one.
    return next((str(path.absolute()) for path in found), None)


def _shipped(method: Method) -> Any:
    return import_module(f"know_cli.{method.hyper_model}.shipped")


def _bundles(method: Method) -> Any:
    return import_module(f"know_cli.{method.hyper_model}.bundle")
