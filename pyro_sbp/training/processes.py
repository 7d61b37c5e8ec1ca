"""Which of the processes of a run this one is, by what its environment says. Needs no torch."""

from __future__ import annotations

import os

__all__ = ["is_first", "num_processes", "processes_here"]


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def num_processes() -> int | None:
    """How many processes `torchrun` has started on all machines; None where it has not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return int(os.environ["WORLD_SIZE"])


def processes_here() -> int:
    """How many of them `torchrun` has started on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"])
