"""Packages that only some experiments need: ``pip install 'pyro-sbp[experiments]'``."""

from __future__ import annotations

from importlib.util import find_spec

from pyro_sbp.errors import RequestError

__all__ = ["check_installed"]


def check_installed(name: str) -> None:
    """Check that a package can be imported.

    Args:
        name: the name with which it is imported.

    Raises:
        RequestError: the package is not installed.
    """
    if find_spec(name) is None:
        raise RequestError(f"this needs {name}: pip install 'pyro-sbp[experiments]'")
