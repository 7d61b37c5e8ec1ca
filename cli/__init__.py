"""The command line.

Commands import torch and Pyro only when they run, so that the help and refusals of wrong requests
appear at once.
"""

from __future__ import annotations

import os
import sys

import click

from pyro_sbp.cli.bench import bench
from pyro_sbp.cli.doctor import doctor
from pyro_sbp.cli.export import export
from pyro_sbp.cli.failures import CommandGroup
from pyro_sbp.cli.inspect import inspect
from pyro_sbp.cli.prune import prune
from pyro_sbp.cli.report import report
from pyro_sbp.cli.stopping import Stopped, stop_at_once
from pyro_sbp.cli.train import train
from pyro_sbp.training.processes import forget_stray_variables, is_first

__all__ = ["cli", "main"]


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pyro-sbp")
def cli() -> None:
    """Make neural networks smaller by Bayesian inference, and measure how much faster they run."""


for command in (train, inspect, prune, bench, export, report, doctor):
    cli.add_command(command)


def main() -> None:
    """Run the command line as a program."""
    stop_at_once()
    forget_stray_variables()
    # As for `python -m`: --arch may name a module of the current directory.
    sys.path.append(os.getcwd())
    try:
        cli.main(prog_name="pyro-sbp")
    except Stopped as stopped:
        if not is_first():
            sys.exit(0)
        click.echo(str(stopped), err=True)
        sys.exit(128 + stopped.number)
