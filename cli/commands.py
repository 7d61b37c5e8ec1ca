"""The group of all commands.

Commands import torch and Pyro only when they run, so that the help and the errors of wrong requests
appear immediately.
"""

from __future__ import annotations

import click

from pyro_sbp.cli.bench import bench
from pyro_sbp.cli.doctor import doctor
from pyro_sbp.cli.export import export
from pyro_sbp.cli.failures import CommandGroup
from pyro_sbp.cli.inspect import inspect
from pyro_sbp.cli.prune import prune
from pyro_sbp.cli.report import report
from pyro_sbp.cli.train import train

__all__ = ["cli"]


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pyro-sbp")
def cli() -> None:
    """Make neural networks smaller by Bayesian inference, and measure how much faster they run."""


for command in (train, inspect, prune, bench, export, report, doctor):
    cli.add_command(command)
