"""The SHA-256 of an output, in a file ``OUT.sha256`` beside it, in the format of ``sha256sum``.

For a file or a folder alike, it has one line for each file of weights and one for the shard index,
with paths relative to the folder that contains ``OUT``; ``sha256sum -c OUT.sha256`` in that folder
checks them.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from know_cli.checkpoints.checkpoint import open_checkpoint
from know_cli.checkpoints.header import unreadable
from know_cli.checkpoints.json_text import MAX_BYTES
from know_cli.errors import CheckpointError, OutputError, quoted
from know_cli.files import destination, open_file, read_bytes, remove_file, sync_folder, write_text

_SUFFIX = ".sha256"
_READ_BYTES = 1 << 20
# A backslash before the digest marks a name in which backslashes and line breaks are escaped.
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


def digest_path(output: Path) -> Path:
    """Return where the digest of an output belongs.

    >>> digest_path(Path("run/out.safetensors")).name
    'out.safetensors.sha256'
    """
    if not output.name:  # "." and the like
        output = output.resolve()
    return output.with_name(output.name + _SUFFIX)


def remove_digest(output: Path) -> None:
    """Remove the digest of an output that was replaced.

    Raises:
        OutputError: it cannot be removed.
    """
    for path in digest_paths(output):
        try:
            if os.path.lexists(path):
                remove_file(path)
                sync_folder(path.absolute().parent)
        except OSError as error:
            raise OutputError(
                f"{path}: is not this output's digest, and cannot be removed: {error.strerror}"
            ) from error


def digest_paths(output: Path) -> set[Path]:
    """Where digests of an output may be: beside its name, and beside what that is a link to."""
    return {digest_path(output), digest_path(destination(output))}


def is_digest(path: Path) -> bool:
    """Whether a file is one of digests, as :func:`write_digest` writes it."""
    try:
        return bool(_read(path))
    except CheckpointError:
        return False


def write_digest(output: Path, *, replace: bool = True) -> Path:
    """Read a finished output and write its digest.

    Args:
        output: that was written.
        replace: whether a digest that exists is replaced.

    Returns:
        The path of the digest.

    Raises:
        CheckpointError: the output cannot be read.
        OutputError: the digest cannot be written.
    """
    path = digest_path(output)
    lines = []
    for name, file in _files(output).items():
        escaped = "".join(_ESCAPES.get(sign, sign) for sign in name)
        mark = "\\" if escaped != name else ""
        lines.append(f"{mark}{_sha256(file)}  {escaped}\n")
    write_text(path, "".join(lines), replace=replace)
    return path


def check_digest(output: Path) -> Path | None:
    """Compare an output with its digest, if it has one.

    Returns:
        The path of the digest; None if there is none.

    Raises:
        CheckpointError: the output is not what was written, or the digest cannot be read.
    """
    path = digest_path(output)
    if not path.exists():
        return None
    expected = _read(path)
    files = _files(output)
    for name in sorted(expected.keys() ^ files.keys()):
        whose, other = (output, path) if name in files else (path, output)
        raise CheckpointError(f"{whose}: has {quoted(name)}, which {other} does not have")
    for name, file in files.items():
        if _sha256(file) != expected[name]:
            raise CheckpointError(
                f"{file}: is not what was written: its SHA-256 is not that of {path}; copy or "
                "predict it again"
            )
    return path


def _files(output: Path) -> dict[str, Path]:
    """Map names in the digest to files, for everything that a model is read from."""
    with open_checkpoint(output) as checkpoint:
        files = [*checkpoint.headers, *([checkpoint.index_path] if checkpoint.index_path else [])]
    base = digest_path(output).name.removesuffix(_SUFFIX)
    return {f"{base}/{file.name}" if checkpoint.is_folder else base: file for file in files}


def _sha256(file: Path) -> str:
    hasher = hashlib.sha256()
    try:
        with open_file(file) as opened:
            while data := opened.read(_READ_BYTES):
                hasher.update(data)
    except OSError as error:
        raise unreadable(file, error) from error
    return hasher.hexdigest()


def _read(path: Path) -> dict[str, str]:
    """Read a file of digests: name → hexadecimal digest."""
    names = {value: key for key, value in _ESCAPES.items()}
    found: dict[str, str] = {}
    try:
        text = read_bytes(path, MAX_BYTES).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise unreadable(path, error) from error
    for line in text.removesuffix("\n").split("\n"):
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(
                f"{path}: is not a file of digests as 'sha256sum' writes it: {quoted(line)}"
            )
        escaped, digest, name = match.groups()
        if escaped:
            name = re.sub(r"\\[\\nr]", lambda sign: names.get(sign[0], sign[0]), name)
        found[name] = digest
    return found
