"""Compiles what is written in C into the package; hatch runs this whenever it builds or installs.

Without a C compiler, or for another processor than it is written for, the package is the same
without it, and runs through torch's operations. KNOW_NATIVE=require makes that an error, for
wheels that are published; KNOW_NATIVE=no leaves it out.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Each source with the library beside it, and how its products and sums round: KNOWN's kernel once a
# product, whatever the compiler; the passes after each.
LIBRARIES = {
    Path("know_cli", "known", "native_kernel.c"): "-ffp-contract=fast",
    Path("know_cli", "passes", "passes.c"): "-ffp-contract=off",
}
NAME = "_native.so"
# What is not a number stays that.
FLAGS = ("-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")


class NativeHook(BuildHookInterface[Any]):
    """Compiles before a wheel is made, the one of an editable installation among them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say for which platform the wheel then is."""
        wish = os.environ.get("KNOW_NATIVE", "")
        made = []
        for source, rounding in LIBRARIES.items():
            library = Path(self.root, source.with_name(NAME))
            library.unlink(missing_ok=True)
            if wish == "no":
                continue
            trouble = compile_library(Path(self.root, source), library, rounding)
            if trouble is None:
                made.append(source.with_name(NAME))
            elif wish == "require":
                raise RuntimeError(trouble)
            else:
                self.app.display_info(f"without {source.name}: {trouble}")
        if made:
            build_data["artifacts"] += [library.as_posix() for library in made]
            build_data["pure_python"] = False
            where = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{where}"


def compile_library(source: Path, library: Path, rounding: str) -> str | None:
    """Compile one library.

    Returns:
        None, or why there is none.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform == "win32":
        return f"it is not written for {sys.platform} on {platform.machine()}"
    command = shlex.split(os.environ.get("CC", "cc"))
    if not command or shutil.which(command[0]) is None:
        return "there is no C compiler"
    done = subprocess.run(
        [*command, *FLAGS, rounding, "-o", str(library), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return None if done.returncode == 0 else f"{command[0]} failed: {done.stderr.strip()[-500:]}"
