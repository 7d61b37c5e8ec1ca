"""Static checks over the package in the layout of the wheel.

In the working tree `pyro_sbp.cli` and `pyro_sbp.experiments` are mapped from other folders, which
import-linter and mypy do not see. So both run over a temporary copy in which every package lies at
its place. ``python tests/wheel_layout.py imports`` checks the contracts of import-linter, and
``types`` runs mypy; both are configured in pyproject.toml.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

__all__ = ["check", "lay_out"]

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "pyproject.toml"
COMMANDS = {
    "imports": (
        "-c",
        "from importlinter.cli import lint_imports_command as lint; lint()",
        "--no-cache",
        "--no-logo",
        str(CONFIG),
    ),
    "types": ("-m", "mypy", "--config-file", str(CONFIG), "--cache-dir", str(ROOT / ".mypy_cache")),
}


def mapped_packages() -> dict[str, str]:
    """From the folder of a package in the wheel to its folder in the working tree."""
    setuptools = tomllib.loads(CONFIG.read_text())["tool"]["setuptools"]
    return {
        package.replace(".", "/"): folder for package, folder in setuptools["package-dir"].items()
    }


def lay_out(target: Path) -> None:
    """Copy the modules of the package to `target`, in the layout of the wheel."""
    for place, folder in mapped_packages().items():
        for path in (ROOT / folder).rglob("*"):
            if path.name == "py.typed" or path.suffix == ".py":
                copy = target / place / path.relative_to(ROOT / folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)


def check(kind: str, tree: Path) -> tuple[int, str]:
    """The exit status and the output of a check, "imports" or "types", over a tree.

    Paths in the output are those of the working tree.
    """
    done = subprocess.run(
        [sys.executable, *COMMANDS[kind]], cwd=tree, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    for place, folder in mapped_packages().items():
        output = output.replace(f"{place}/", f"{folder}/")
    return done.returncode, output


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        status, output = check(sys.argv[1], Path(folder))
    print(output, end="")
    sys.exit(status)
