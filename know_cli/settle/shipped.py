"""Where bundles of the hyper-model settle are: those given by a path, and those shipped.

A family is a folder of bundles for different numbers of checkpoints, ``window-5`` and so on.
Nothing is read here but the names of files, so that a wrong name is known before torch is imported.
"""

from __future__ import annotations

from pathlib import Path

from know_cli.errors import CheckpointError, UsageError

MANIFEST = "manifest.json"
#: The entry ``model`` of the manifest.
MODEL = "settle"
#: The family that is taken where none is named.
DEFAULT_WEIGHTS = "settle"
#: The fewest checkpoints that tell how a run goes.
FEWEST = 3
FOLDER = "window-"


def _weights_folder() -> Path:
    """The folder of the shipped families: inside the package (wheel) or beside it (checkout)."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "weights"
    return inside if inside.is_dir() else package.parent / "weights"


def _is_path(weights: str) -> bool:
    """Whether it is a path, which has to look like one, and not the name of a shipped family."""
    return "/" in weights or weights in (".", "..")


def shipped() -> dict[str, dict[int, Path]]:
    """Shipped bundles: family name → number of checkpoints → folder."""
    families: dict[str, dict[int, Path]] = {}
    for manifest in sorted(_weights_folder().glob(f"*/{FOLDER}*/{MANIFEST}")):
        families.setdefault(manifest.parent.parent.name, {}).update(_sized(manifest))
    return families


def _sized(manifest: Path) -> dict[int, Path]:
    number = manifest.parent.name.removeprefix(FOLDER)
    return {int(number): manifest.parent} if number.isdecimal() else {}


def _family(weights: str) -> dict[int, Path]:
    sizes: dict[int, Path] = {}
    if _is_path(weights):
        for manifest in Path(weights).glob(f"{FOLDER}*/{MANIFEST}"):
            sizes.update(_sized(manifest))
    else:
        sizes = shipped().get(weights, {})
    if not sizes:
        raise UsageError(
            f"--weights {weights}: neither a folder with a hyper-model settle ({MANIFEST}) nor a "
            f"shipped one ({', '.join(shipped()) or 'none'}); train one with 'know train "
            "--objective network', or take --method average"
        )
    return dict(sorted(sizes.items()))


def check_weights_name(weights: str) -> None:
    """Refuse what is neither a folder nor a shipped name, before torch is imported.

    Raises:
        UsageError: it is neither.
    """
    if not (_is_path(weights) and Path(weights).is_dir()):
        _family(weights)


def find_bundle(weights: str | None, checkpoints: int) -> Path:
    """Resolve ``--weights`` to the folder of one bundle.

    Args:
        weights: the name of a shipped family, or the path of a bundle's folder or of a family's.
            None is :data:`DEFAULT_WEIGHTS`.
        checkpoints: S of the trajectory.

    Raises:
        UsageError: nothing of that name.
        CheckpointError: there is none for that S; the message names those available.
    """
    weights = DEFAULT_WEIGHTS if weights is None else weights
    path = Path(weights)
    if _is_path(weights) and (path / MANIFEST).exists():
        return path
    sizes = _family(weights)
    if checkpoints not in sizes:
        available = ", ".join(str(size) for size in sizes)
        raise CheckpointError(
            f"--weights {weights}: has no hyper-model for {checkpoints} checkpoints, only "
            f"for {available}; give as many (--last {max(sizes)}), or take --method average"
        )
    return sizes[checkpoints]
