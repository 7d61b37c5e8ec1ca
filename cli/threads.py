"""The number of CPU threads of a command."""

from __future__ import annotations

import click

from pyro_sbp.training.processes import is_first, num_processes, processes_here
from pyro_sbp.training.threads import choose_threads

__all__ = ["threads_to_use"]


def threads_to_use(
    threads: int | None = None, devices: int = 1, recorded: int | None = None
) -> int:
    """The number of CPU threads for each process; one line on stderr if the machine is busy.

    Args:
        threads: the number that the user gave.
        devices: the number of devices of the run, one process each.
        recorded: the number of threads with which a resumed run was started.
    """
    here = devices if num_processes() is None else processes_here()
    choice = choose_threads(threads, here, recorded)
    if choice.warning is not None and is_first():
        click.echo(choice.warning, err=True)
    return choice.threads
