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


@pytest.mark.parametrize(
    ("contract", "module", "imported"),
    [
        ("downwards", "gates/layers.py", "pyro_sbp.cli.common"),
        ("downwards", "special/frame.py", "pyro_sbp.training.loop"),
        ("downwards", "cli/common.py", "pyro_sbp.experiments.tables"),
        ("downwards", "reports/pages.py", "pyro_sbp.experiments.tables"),
        ("cycle", "models/sites.py", "pyro_sbp.models.gated_model"),
        ("torch", "training/files.py", "torch"),
        ("torch", "recipes/__init__.py", "pyro_sbp.errors\nimport pyro_sbp.networks"),
    ],
)
def test_a_forbidden_import_breaks_a_contract(tree, contract, module, imported):
    path = tree / "pyro_sbp" / module
    path.write_text(f"{path.read_text()}\nimport {imported}\n")
    status, output = check("imports", tree)
    assert status == 1
    broken = [line for line in output.splitlines() if "BROKEN" in line]
    assert any(contract in line for line in broken), output


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
