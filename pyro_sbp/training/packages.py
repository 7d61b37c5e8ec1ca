"""The versions of pyro-sbp and its packages, and which extras are installed. Needs no torch."""

from __future__ import annotations

import contextlib
import importlib
import io
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pyro_sbp.errors import first_line

__all__ = ["Extra", "Package", "find_extras", "find_versions"]


@dataclass(frozen=True)
class Package:
    """A package that an extra requires.

    Attributes:
        version: the installed version; None if the package is not installed.
        problem: why the package cannot be used; None if it can be used.
    """

    version: str | None
    problem: str | None = None


@dataclass(frozen=True)
class Extra:
    """An extra, such as ``export`` in ``pip install 'pyro-sbp[export]'``.

    Attributes:
        installed: whether all packages of the extra can be used.
        packages: these packages, by name.
    """

    installed: bool
    packages: dict[str, Package]


def find_versions(name: str = "pyro-sbp") -> tuple[dict[str, str | None], list[str]]:
    """The versions of Python, of a distribution and of the packages that it needs.

    No package is imported.

    Args:
        name: the distribution.

    Returns:
        The versions by name, None for a package that is not installed; and the problems, such as a
        package that is too old, one line each.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions[name] = _version(name)
    problems = [] if versions[name] is not None else [f"{name}: not installed"]
    for requirement in _requirements(name):
        package = _package(requirement)
        versions[requirement.name] = package.version
        if package.problem is not None:
            problems.append(f"{requirement.name}: {package.problem}")
    return versions, problems


def find_extras(name: str = "pyro-sbp") -> dict[str, Extra]:
    """The extras that the metadata of an installed distribution declares.

    Their packages are imported, because an installed package may be broken. For the tools that only
    the extra "dev" has, only the version is checked.

    Args:
        name: the distribution.
    """
    try:
        extras = metadata.metadata(name).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return {}
    tried: dict[str, Package] = {}
    found = {}
    for extra in sorted(extras, key="dev".__eq__):
        packages = {}
        for requirement in _requirements(name, extra):
            if str(requirement) not in tried:
                tried[str(requirement)] = _package(requirement, imported=extra != "dev")
            packages[requirement.name] = tried[str(requirement)]
        installed = all(package.problem is None for package in packages.values())
        found[extra] = Extra(installed, packages)
    return {extra: found[extra] for extra in extras}


def _requirements(name: str, extra: str = "") -> Iterator[Requirement]:
    """The requirements of a distribution at run time, or those that an extra adds."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    all_of_them = [Requirement(line) for line in lines]
    extras, waiting = {""}, [extra]
    while waiting:
        extras.add(current := waiting.pop())
        for requirement in all_of_them:
            marker = requirement.marker
            if current and (marker is None or marker.evaluate({"extra": ""})):
                continue
            if marker is not None and not marker.evaluate({"extra": current}):
                continue
            if canonicalize_name(requirement.name) != canonicalize_name(name):
                yield Requirement(f"{requirement.name}{requirement.specifier}")
            else:  # an extra that contains others
                waiting += sorted(requirement.extras - extras)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(requirement: Requirement, imported: bool = False) -> Package:
    version = _version(requirement.name)
    if version is None:
        return Package(None, "not installed")
    if not requirement.specifier.contains(version, prereleases=True):
        return Package(version, f"expected {requirement.specifier}")
    return Package(version, _import_problem(requirement.name) if imported else None)


def _import_problem(name: str) -> str | None:
    """Why the modules of a distribution cannot be imported, or None."""
    for module in _modules(metadata.distribution(name)):
        output = io.StringIO()
        try:
            with (
                contextlib.redirect_stdout(output),
                contextlib.redirect_stderr(output),
                warnings.catch_warnings(action="ignore"),
            ):
                importlib.import_module(module)
        except (Exception, SystemExit) as error:  # a broken package may raise anything
            kind = type(error).__name__
            text = first_line(error)
            return f"cannot be imported: {kind}{'' if text == kind else f': {text}'}"
    return None


def _modules(distribution: metadata.Distribution) -> list[str]:
    """The top-level modules of a distribution: the module with its name, or all public modules."""
    found = set()
    for file in distribution.files or ():
        top = file.parts[0]
        if len(file.parts) == 1 and top.endswith(".py"):
            found.add(top.removesuffix(".py"))
        elif len(file.parts) == 2 and file.parts[1] == "__init__.py":
            found.add(top)
    own = canonicalize_name(distribution.name).replace("-", "_")
    return [own] if own in found else sorted(name for name in found if not name.startswith("_"))
