"""Processes that begin with torch, Pyro and Fabric imported.

A new interpreter needs seconds to import them. These processes are forked from one that has done so
(the fork server of multiprocessing), so they have no state of the tests. They suit tests of what a
process does with signals, files and other processes, not of what it imports, and not of its exit:
as processes of multiprocessing, they run no functions of `atexit`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from types import TracebackType

import torch

__all__ = ["COMMAND_LINE", "WarmProcess"]

#: The program `pyro-sbp`.
COMMAND_LINE = "from pyro_sbp.cli import main; main()"

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [__name__, "pyro_sbp.cli.commands", "pyro_sbp.training.train", "sklearn.datasets"]
)


class WarmProcess:
    """A process that runs a program, used as `subprocess.Popen` is.

    Args:
        program: Python source, as for ``python -c``.
        arguments: what `sys.argv` has after the name of the program.
        environment: the environment variables; by default those of this process.

    Attributes:
        pid: the number of the process.
        stderr: what it writes to stderr, as a text file. Its stdout is discarded.
    """

    def __init__(
        self,
        program: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        reader, writer = _CONTEXT.Pipe(duplex=False)
        environment = dict(os.environ if environment is None else environment)
        words = ["pyro-sbp", *map(str, arguments)]
        self._process = _CONTEXT.Process(
            target=_run, args=(program, words, environment, os.getcwd(), writer)
        )
        self._process.start()
        writer.close()
        self.pid = self._process.pid
        self.stderr = os.fdopen(os.dup(reader.fileno()))
        reader.close()

    def poll(self) -> int | None:
        """The exit status, or the negative number of the signal that ended it; None before."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        """The exit status, when the process has ended.

        Raises:
            TimeoutError: it has not ended within `seconds`.
        """
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} has not ended within {seconds} seconds")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def __enter__(self) -> WarmProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self.stderr.close()


def _run(
    program: str,
    arguments: list[str],
    environment: dict[str, str],
    directory: str,
    stderr: Connection,
) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os.dup2(stderr.fileno(), sys.stderr.fileno())
    stderr.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    warnings.simplefilter("ignore")
    sys.argv = arguments
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
