"""Where bundles of KNOWN are: those given by a path, and those shipped with the program.

A family is a folder of bundles for different numbers of checkpoints, ``checkpoints-5`` and so
on; the shipped families lie under ``weights``. Nothing is read here but the names of files, so
that a wrong name is known before torch is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from know_cli.errors import CheckpointError, OutputError, UsageError
from know_cli.files import destination, missing_folder
from know_cli.files.protected import Protected

MANIFEST = "manifest.json"
#: The family that is taken where none is named.
DEFAULT_WEIGHTS = "continuation"
_FOLDER = "checkpoints-"
_FILES = ("conv.safetensors", "fc.safetensors", "bias.safetensors", MANIFEST)
_KERAS = "KNOWN_*.h5"


def weights_folder() -> Path:
    """The folder of the shipped families: inside the package (wheel) or beside it (checkout)."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "weights"
    return inside if inside.is_dir() else package.parent / "weights"


def shipped() -> dict[str, dict[int, Path]]:
    """Shipped bundles: family name → number of checkpoints → folder."""
    families: dict[str, dict[int, Path]] = {}
    for manifest in sorted(weights_folder().glob(f"*/{_FOLDER}*/{MANIFEST}")):
        families.setdefault(manifest.parent.parent.name, {})[_size(manifest.parent)] = (
            manifest.parent
        )
    return families


def _size(folder: Path) -> int:
    try:
        return int(folder.name.removeprefix(_FOLDER))
    except ValueError:
        return 0


def is_keras_folder(path: Path) -> bool:
    """Whether a folder holds KNOWN files that Keras saved."""
    return any(path.glob(_KERAS))


def is_path(weights: str) -> bool:
    """Whether ``--weights`` is a path and not the name of a shipped family.

    A folder that happens to lie in the working directory under a shipped name must not be
    taken for it, so that a path has to look like one: ``./continuation``.
    """
    return "/" in weights or weights in (".", "..")


def family(weights: str, option: str = "--weights") -> dict[int, Path]:
    """Bundles for several numbers of checkpoints: that number → folder, ascending.

    Args:
        weights: the path of a folder of bundles, or the name of a shipped family; see
            :func:`is_path`.
        option: that it was given with, for the message.

    Raises:
        UsageError: neither.
    """
    path, families = Path(weights), shipped()
    if is_path(weights):
        sizes = {_size(manifest.parent): manifest.parent for manifest in path.glob(f"*/{MANIFEST}")}
    else:
        sizes = families.get(weights, {})
    if not sizes:
        is_here = not is_path(weights) and path.is_dir()
        hint = f"; for the folder write ./{weights}" if is_here else ""
        raise UsageError(
            f"{option} {weights}: neither a folder with a hyper-model ({MANIFEST}, or {_KERAS}) "
            f"nor a shipped one ({', '.join(families) or 'none'}){hint}"
        )
    return dict(sorted(sizes.items()))


def check_weights_name(weights: str, option: str = "--weights") -> None:
    """Refuse what is neither a folder nor a shipped name, before torch is imported.

    Raises:
        UsageError: it is neither.
    """
    if not (is_path(weights) and Path(weights).is_dir()):
        family(weights, option)


def find_bundle(weights: str | None, checkpoints: int) -> Path:
    """Resolve ``--weights`` to the folder of one bundle.

    Args:
        weights: the name of a shipped family, or the path (see :func:`is_path`) of a bundle's
            folder, of a folder of such for several numbers of checkpoints, or of a folder of
            Keras files. None is :data:`DEFAULT_WEIGHTS`.
        checkpoints: S of the trajectory.

    Raises:
        UsageError: nothing of that name.
        CheckpointError: there is no KNOWN for that S; the message names those available.

    >>> find_bundle("continuation", 5).name
    'checkpoints-5'
    """
    weights = DEFAULT_WEIGHTS if weights is None else weights
    path = Path(weights)
    if is_path(weights) and ((path / MANIFEST).exists() or is_keras_folder(path)):
        return path
    sizes = family(weights)
    if checkpoints not in sizes:
        available = ", ".join(str(size) for size in sorted(sizes))
        raise CheckpointError(
            f"--weights {weights}: has no KNOWN for {checkpoints} checkpoints, only for "
            f"{available}; give as many checkpoints, or train one with 'know train'"
        )
    return sizes[checkpoints]


def check_bundle_output(output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse to write a bundle where something else is, before any work is done.

    Args:
        output: the folder.
        inputs: files and folders that are read, and must not be changed.
        force: whether a bundle that exists may be replaced.

    Raises:
        OutputError: the reason, and what to do.
    """
    if not output.parent.is_dir():
        raise missing_folder(output.parent)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; a bundle is a folder, name another")
    folders = [path for path in inputs if path.is_dir()]
    Protected([path for path in inputs if path not in folders], folders).refuse(
        output, [destination(output), *(output / name for name in _FILES)]
    )
    if output.is_dir() and any(output.iterdir()) and not force:
        raise OutputError(f"{output}: exists already; --force replaces it")
