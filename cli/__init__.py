"""The command line. Commands import torch and Pyro only when they run, so that help and refusals of
bad requests answer at once."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from pyro_sbp.cli.bench import bench
from pyro_sbp.cli.export import export
from pyro_sbp.cli.inspect import inspect
from pyro_sbp.cli.prune import prune
from pyro_sbp.cli.report import report
from pyro_sbp.cli.stopping import Stopped, stop_at_once
from pyro_sbp.cli.train import train
from pyro_sbp.errors import OfOneProcess, RequestError, first_line
from pyro_sbp.training.processes import forget_stray_variables, is_first

__all__ = ["cli", "main"]


class _Group(click.Group):
    """Turns the library's refusals into one line and exit status 2, failures into status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RequestError as error:
            raise _Refusal(str(error)) from error
        except click.UsageError as error:
            raise _Refusal(" ".join(error.format_message().split())) from error
        except (FloatingPointError, OSError, RuntimeError) as error:
            if isinstance(error, click.exceptions.Exit):
                raise
            raise _Failure(first_line(error)) from error


class _Failure(click.ClickException):
    def show(self, file: Any = None) -> None:
        """Say it once, where several processes find the same fault."""
        if is_first() or isinstance(self.__cause__, OfOneProcess):
            super().show(file)


class _Refusal(_Failure):
    exit_code = 2


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pyro-sbp")
def cli() -> None:
    """Make neural networks smaller by Bayesian inference, and see how much faster they run."""


cli.add_command(train)
cli.add_command(inspect)
cli.add_command(prune)
cli.add_command(bench)
cli.add_command(export)
cli.add_command(report)


def main() -> None:
    """Run the command line as a program."""
    stop_at_once()
    forget_stray_variables()
    # As for `python -m`: --arch may name a module that lies here.
    sys.path.append(os.getcwd())
    try:
        cli.main(prog_name="pyro-sbp")
    except Stopped as stopped:
        if not is_first():
            sys.exit(0)
        click.echo(str(stopped), err=True)
        sys.exit(128 + stopped.number)
