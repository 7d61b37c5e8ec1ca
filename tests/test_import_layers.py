"""The import contracts hold, and an import that runs against them breaks them."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from wheel_layout import check, lay_out


@pytest.fixture
def tree(tmp_path):
    lay_out(tmp_path)
    return tmp_path


def test_the_tree_keeps_its_contracts(tree):
    status, output = check("imports", tree)
    assert status == 0, output
    assert "3 kept, 0 broken" in output


#: Modules, with an import that each may not have, and the line of the check that names it.
FORBIDDEN = [
    ("gates/layers.py", "pyro_sbp.cli.common", "gates.layers -> pyro_sbp.cli.common (l."),
    ("special/frame.py", "pyro_sbp.training.loop", "special.frame -> pyro_sbp.training.loop (l."),
    ("cli/common.py", "pyro_sbp.experiments.tables", "cli.common -> pyro_sbp.experiments.tables"),
    ("reports/pages.py", "pyro_sbp.experiments.tables", "reports.pages -> pyro_sbp.experiments."),
    ("models/sites.py", "pyro_sbp.models.gated_model", "- .sites -> .gated_model (1 import)"),
    ("training/files.py", "torch", "pyro_sbp.training.files -> torch (l."),
    ("recipes/__init__.py", "pyro_sbp.networks", "pyro_sbp.recipes -> pyro_sbp.networks (l."),
]


def test_forbidden_imports_break_the_contracts_and_are_named(tree):
    for module, imported, _ in FORBIDDEN:
        path = tree / "pyro_sbp" / module
        path.write_text(f"{path.read_text()}\nimport {imported}\n")
    status, output = check("imports", tree)
    assert status == 1 and "0 kept, 3 broken" in output
    for _, _, line in FORBIDDEN:
        assert line in output, line


def test_a_package_without_a_layer_breaks_the_contract(tree):
    (tree / "pyro_sbp" / "elsewhere").mkdir()
    (tree / "pyro_sbp" / "elsewhere" / "__init__.py").write_text("")
    status, output = check("imports", tree)
    assert status == 1
    assert "elsewhere" in output


def test_the_contract_without_torch_has_all_that_the_command_line_imports_first():
    config = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    (light,) = [c for c in config["tool"]["importlinter"]["contracts"] if c["id"] == "light"]
    program = (
        "import sys, pyro_sbp.cli.commands; print(*(n for n in sys.modules if 'pyro_sbp' in n))"
    )
    loaded = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    first = {name for name in loaded if not name.startswith(("pyro_sbp.cli", "__editable"))}
    expected = {name for name in first - {"pyro_sbp"} if not name.startswith("pyro_sbp.recipes")}
    assert expected <= set(light["source_modules"])
