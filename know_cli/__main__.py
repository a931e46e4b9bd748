"""``python -m know_cli`` is the command ``know``."""

from know_cli.cli.main import know

if __name__ == "__main__":
    know()
