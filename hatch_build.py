"""Compiles KNOWN's native kernel into the package; hatch runs this whenever it builds or installs.

Without a C compiler, or for another processor than the kernel is written for, the package is the
same without it, and runs KNOWN through torch's operations. KNOW_NATIVE=require makes that an
error, for wheels that are published; KNOW_NATIVE=no leaves the kernel out.
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

SOURCE = Path("know_cli", "known", "native_kernel.c")
LIBRARY = Path("know_cli", "known", "_native.so")
# A sum of products rounds once a product, whatever the compiler; what is not a number stays that.
FLAGS = ("-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")


class NativeKernelHook(BuildHookInterface[Any]):
    """Compiles before a wheel is made, the one of an editable installation among them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say for which platform the wheel then is."""
        wish = os.environ.get("KNOW_NATIVE", "")
        library = Path(self.root, LIBRARY)
        library.unlink(missing_ok=True)
        if wish == "no":
            return
        trouble = compile_kernel(Path(self.root, SOURCE), library)
        if trouble is None:
            build_data["artifacts"].append(LIBRARY.as_posix())
            build_data["pure_python"] = False
            where = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{where}"
        elif wish == "require":
            raise RuntimeError(trouble)
        else:
            self.app.display_info(f"without the native kernel: {trouble}")


def compile_kernel(source: Path, library: Path) -> str | None:
    """Compile the kernel.

    Returns:
        None, or why there is none.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform == "win32":
        return f"it is not written for {sys.platform} on {platform.machine()}"
    command = shlex.split(os.environ.get("CC", "cc"))
    if not command or shutil.which(command[0]) is None:
        return "there is no C compiler"
    done = subprocess.run(
        [*command, *FLAGS, "-o", str(library), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return None if done.returncode == 0 else f"{command[0]} failed: {done.stderr.strip()[-500:]}"
