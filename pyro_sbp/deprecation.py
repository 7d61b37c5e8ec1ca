"""Old public names, which still work and give a `FutureWarning` that names the new one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["renamed_attribute", "renamed_names", "warn_renamed", "with_new_names"]


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that a name is deprecated.

    Args:
        old: the deprecated name.
        new: the name to use instead.
        stacklevel: 2 for the caller of the function that warns, 3 for the caller of that caller.
    """
    warnings.warn(f"{old} is deprecated: use {new}", FutureWarning, stacklevel=stacklevel + 1)


def renamed_attribute(owner: str, old: str, new: str) -> Any:
    """A property that reads and sets the attribute `new` under its old name.

    Args:
        owner: the name of the class, for the warning.
        old: the deprecated name.
        new: the name of the attribute.
    """

    def read(self: Any) -> Any:
        warn_renamed(f"{owner}.{old}", new)
        return getattr(self, new)

    def write(self: Any, value: Any) -> None:
        warn_renamed(f"{owner}.{old}", new)
        setattr(self, new, value)

    return property(read, write, doc=f"Deprecated name of `{new}`.")


def renamed_names(
    module: str, names: Mapping[str, str], found: Mapping[str, Any]
) -> Callable[[str], Any]:
    """The function ``__getattr__`` of a module with deprecated names.

    Args:
        module: the name of the module.
        names: from each old name to the new one.
        found: the variables of the module.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name])
        return found[names[name]]

    return get


def with_new_names(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The attributes of an object from a file that may have them under their old names."""
    return {names.get(name, name): value for name, value in state.items()}
