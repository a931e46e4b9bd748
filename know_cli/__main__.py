"""``python -m know_cli`` is the command ``know``."""

import sys
from pathlib import Path

# Python looks for modules in the working folder first, where a stranger's ``torch.py`` may lie.
if sys.path and sys.path[0] in ("", str(Path.cwd())):
    del sys.path[0]

from know_cli.cli.main import know

if __name__ == "__main__":
    know()
