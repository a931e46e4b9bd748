"""Peak resident memory of a process, measured from outside."""

from __future__ import annotations

import os
import subprocess
import sys

# Of a process of its own, since the peak that Linux reports of a child starts with its parent's.
LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(child.pid, 0)
assert status == 0, status
print(usage.ru_maxrss)
"""


def peak(*arguments: object) -> int:
    """Peak resident bytes of ``python …``."""
    command = [sys.executable, "-c", LAUNCHER, sys.executable, *map(str, arguments)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1]) * 1024
