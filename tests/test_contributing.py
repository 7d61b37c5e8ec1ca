"""CONTRIBUTING.md names what there is."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_files_that_it_names_exist():
    names = set(re.findall(r"`([\w./]+\.(?:py|md|toml))`", PAGE))
    assert len(names) > 8
    for name in names:
        places = [ROOT, ROOT / "pyro_sbp", ROOT / "tests" / "distributions"]
        assert any((place / name).is_file() for place in places), name


def test_its_table_has_the_layers_of_the_import_contract():
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    named = [re.findall(r"`(\w+)(?:/|\.py)`", row) for row in rows]
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = contracts["contracts"][0]["layers"]
    order = {name: i for i, layer in enumerate(layers) for name in layer.split(" | ")}
    assert {name for row in named for name in row} == order.keys() - {"plots", "errors"}
    depths = [order[name] for row in named for name in row]
    assert depths == sorted(depths)
