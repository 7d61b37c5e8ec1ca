"""The garbage collector of Python during the measurement of a network."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collecting_new_objects"]


@contextmanager
def collecting_new_objects() -> Iterator[None]:
    """A context in which the garbage collector skips the objects that exist at its start.

    Libraries and networks have hundreds of thousands of objects, and a measurement creates many
    that live shortly. The collector would visit the former again and again.
    """
    if gc.get_freeze_count():  # the caller has frozen objects, which `gc.unfreeze` would undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
