"""The documentation is built as a site, in strict mode and without the network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("furo")

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--nitpicky", "--fail-on-warning"]
    done = subprocess.run(
        [*command, "--keep-going", str(DOCS), str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return target


def test_it_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//", text), page


def test_every_picture_is_there(site):
    found = 0
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"<(?:img|source)[^>]*(?:src|srcset)=\"([^\":]+)\"", text):
            assert (page.parent / name).is_file(), (page, name)
            found += 1
    assert found > 4


def test_pictures_follow_the_switch_of_the_theme(site):
    for page, name in (("index", "frontier"), ("method", "prior")):
        text = (site / f"{page}.html").read_text(encoding="utf-8")
        for kind, file in (("light", name), ("dark", f"{name}-dark")):
            assert re.search(rf'<img class="only-{kind}" alt="[^"]+" src="{file}.svg">', text)
        assert "<picture" not in text


def test_options_of_commands_keep_their_two_hyphens(site):
    text = (site / "reference" / "command_line.html").read_text(encoding="utf-8")
    assert "--macs-ratio" in text and "\u2013" not in text


def test_formulas_are_mathml(site):
    text = (site / "method.html").read_text(encoding="utf-8")
    assert text.count("<math ") > 20 and "\\mathrm" not in re.sub(r"<[^>]*>", "", text)


def test_the_reference_has_commands_and_functions(site):
    commands = (site / "reference" / "command_line.html").read_text(encoding="utf-8")
    for name in ("train", "inspect", "prune", "bench", "export", "report", "doctor"):
        assert f'id="pyro-sbp-{name}"' in commands
    functions = (site / "reference" / "python.html").read_text(encoding="utf-8")
    import pyro_sbp
    from pyro_sbp import distributions, networks, special

    names = set(pyro_sbp.__all__) - {"distributions", "networks"}  # modules
    names |= {*distributions.__all__, *networks.__all__, *special.__all__}
    # Classes of arguments and results.
    names |= {"Comparison", "Gates", "Measured", "Parts", "Size", "Span", "Split", "Units"}
    for name in names:
        assert re.search(rf'id="pyro_sbp\.([a-z_.]+\.)?{name}"', functions), name
