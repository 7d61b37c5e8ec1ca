"""The rank of this process in the group of a run, read from the environment. Needs no torch.

A run has several processes if `torchrun` started the command, or if it was started with
``--devices N`` and started N - 1 copies of itself. Schedulers, notebooks and other programs may
also set variables such as ``RANK``, so these are read only in one of the two kinds of group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pyro_sbp.errors import RequestError

__all__ = [
    "forget_stray_variables",
    "is_first",
    "num_processes",
    "processes_here",
    "rank",
    "starting_copies",
]

#: Set in the environment of the copies of itself that a run with several devices starts.
OWN_GROUP = "PYRO_SBP_OWN_GROUP"
#: Set by torchrun in the environment of all processes that it starts.
TORCHRUN = "TORCHELASTIC_RUN_ID"
#: The variables from which torch and Lightning Fabric read a process group.
VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def rank() -> int:
    """The number of this process in its group, from 0; 0 without a group.

    Raises:
        RequestError: `torchrun` started the process, and ``RANK`` is missing or not an integer.
    """
    if TORCHRUN in os.environ:
        return _set_by_torchrun("RANK", 0)
    # The copies of a run are all on one machine.
    return int(os.environ["LOCAL_RANK"]) if _is_copy() else 0


def is_first() -> bool:
    """Whether this is the process that writes files and messages."""
    try:
        return rank() == 0
    except RequestError:  # let this process print the message
        return True


def num_processes() -> int | None:
    """The number of processes that `torchrun` started on all machines; None without `torchrun`.

    Raises:
        RequestError: the variables of `torchrun` are missing or not integers.
    """
    if TORCHRUN not in os.environ:
        return None
    for name, least in (("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        _set_by_torchrun(name, least)
    return _set_by_torchrun("WORLD_SIZE", 1)


def processes_here() -> int:
    """The number of processes that `torchrun` started on this machine.

    Raises:
        RequestError: the variable of `torchrun` is missing or not an integer.
    """
    return _set_by_torchrun("LOCAL_WORLD_SIZE", 1)


def forget_stray_variables() -> dict[str, str]:
    """Remove the variables of a process group if this process is not in a group.

    Importing Fabric fails if ``RANK`` is not a number, a stray ``LOCAL_RANK`` keeps Fabric from
    starting the other processes, and with a stray ``MASTER_ADDR`` they wait for another machine.

    Returns:
        The variables that were removed, with their values.
    """
    if TORCHRUN in os.environ or _is_copy():
        return {}
    return {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}


@contextmanager
def starting_copies(threads: int | None = None) -> Iterator[None]:
    """Within the context, processes that this process starts join its group.

    Args:
        threads: the number of CPU threads of these processes, if neither the user nor the command
            sets one.
    """
    changes = {OWN_GROUP: "1"}
    if threads is not None:
        changes["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _is_copy() -> bool:
    return OWN_GROUP in os.environ and _is_integer(os.environ.get("LOCAL_RANK", ""))


def _set_by_torchrun(name: str, least: int) -> int:
    text = os.environ.get(name, "")
    if not _is_integer(text) or int(text) < least:
        raise RequestError(
            f"{TORCHRUN} is set, so torchrun started this command, but {name} is {text!r}; "
            f"expected an integer >= {least}"
        )
    return int(text)


def _is_integer(text: str) -> bool:
    return text.isascii() and text.isdecimal()
