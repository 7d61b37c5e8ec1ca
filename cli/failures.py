"""The message and the exit status of a command that fails."""

from __future__ import annotations

from typing import Any

import click

from pyro_sbp.errors import RequestError, SingleProcessError, first_line
from pyro_sbp.training.processes import is_first, rank

__all__ = ["CommandGroup"]

#: The key of a context's `meta` that says whether to print tracebacks.
DEBUG = "pyro_sbp.debug"
HINT = "run again with --debug for the traceback"


def _debug_option(envvar: str | None = None) -> click.Option:
    """The flag --debug. It is read before other options, so that it applies to their errors too."""

    def remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            ctx.meta[DEBUG] = True

    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        envvar=envvar,
        show_envvar=envvar is not None,
        help="Print the traceback if the command fails.",
    )


class CommandGroup(click.Group):
    """A group of commands that prints an exception as one line on stderr.

    The exit status is 2 for a wrong request, and 1 for any other failure. The message of an
    unexpected exception names its type and the flag --debug, which the group and its commands have.
    With it, the traceback is printed before the message.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option("PYRO_SBP_DEBUG"))

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command, with the flag --debug."""
        if not any(parameter.name == "debug" for parameter in cmd.params):
            cmd.params.append(_debug_option())
        super().add_command(cmd, name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse wrong options of the group in the same way as those of its commands."""
        if not args:  # click shows the help
            return super().parse_args(ctx, args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _Refusal(_usage(error)) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that is named in the arguments."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):  # RuntimeErrors of click
            raise
        except click.UsageError as error:
            raise _Refusal(_usage(error)) from error
        # click ends without a message if the pipe is closed.
        except (click.ClickException, BrokenPipeError):
            raise
        except RequestError as error:
            raise _Refusal(str(error), debug=DEBUG in ctx.meta) from error
        except Exception as error:
            raise _Failure.of(error, debug=DEBUG in ctx.meta) from error


class _Failure(click.ClickException):
    """A failure as click shows it.

    Args:
        message: one line.
        debug: whether to print the traceback of the cause.
        unexpected: whether every process shows it.
    """

    def __init__(self, message: str, *, debug: bool = False, unexpected: bool = False) -> None:
        super().__init__(message)
        self.debug = debug
        self.unexpected = unexpected

    @classmethod
    def of(cls, error: Exception, debug: bool) -> _Failure:
        """The failure for an exception."""
        text = first_line(error)
        if _is_expected(error):
            return cls(text, debug=debug)
        name = type(error).__name__
        words = "" if text == name else f": {text.rstrip('. ')}"
        hint = "" if debug else f"; {HINT}"
        where = "" if is_first() else f"process {rank()}: "
        return cls(f"{where}unexpected {name}{words}{hint}", debug=debug, unexpected=True)

    def show(self, file: Any = None) -> None:
        """Print the error. If all processes have the same error, only the first one prints it."""
        cause = self.__cause__
        if not (is_first() or self.unexpected or isinstance(cause, SingleProcessError)):
            return
        if self.debug and cause is not None:
            import traceback  # imported here to keep `pyro-sbp --help` fast

            click.echo("".join(traceback.format_exception(cause)), file=file, err=True, nl=False)
        super().show(file)


class _Refusal(_Failure):
    exit_code = 2


def _is_expected(error: Exception) -> bool:
    """Whether the message of an error is enough, without its type and the hint about --debug.

    This is so for errors of the system and of this package.
    """
    own = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
    return own or isinstance(error, FloatingPointError | OSError)


def _usage(error: click.UsageError) -> str:
    return " ".join(error.format_message().split())
