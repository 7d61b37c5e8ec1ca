"""The command line.

Only `main` is imported at first, so that it handles signals while the commands are imported.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from pyro_sbp.cli.stopping import Stopped, stop_at_once
from pyro_sbp.cli.warning_lines import print_warnings_as_lines

__all__ = ["cli", "main"]


def main() -> None:
    """Run the command line as a program."""
    stop_at_once()
    print_warnings_as_lines()
    try:
        from pyro_sbp.cli.commands import cli
        from pyro_sbp.training.processes import forget_stray_variables

        forget_stray_variables()
        # --arch may name a module of the current directory. The installed program does not have
        # that directory in its path, unlike `python -m`.
        sys.path.append(os.getcwd())
        cli.main(prog_name="pyro-sbp")
    except Stopped as stopped:
        from pyro_sbp.training.processes import is_first

        if not is_first():
            sys.exit(0)
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)


def __getattr__(name: str) -> Any:
    if name == "cli":
        from pyro_sbp.cli.commands import cli

        return cli
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
