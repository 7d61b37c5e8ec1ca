"""Versions and extras are those that the metadata of an installation declare."""

import platform
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pyro_sbp.training.packages import Extra, Package, find_extras, find_versions

ROOT = Path(__file__).parents[2]
METADATA = """\
Metadata-Version: 2.1
Name: main-package
Version: 1.0
Requires-Dist: whole>=1
Requires-Dist: elsewhere>=1; sys_platform == "none"
Requires-Dist: absent>=3
Requires-Dist: old-one>=2
Provides-Extra: good
Requires-Dist: whole>=1; extra == "good"
Provides-Extra: bad
Requires-Dist: broken; extra == "bad"
Requires-Dist: leaving; extra == "bad"
Requires-Dist: absent; extra == "bad"
Requires-Dist: old-one>=2; extra == "bad"
Requires-Dist: elsewhere; sys_platform == "none" and extra == "bad"
Provides-Extra: dev
Requires-Dist: main-package[good]; extra == "dev"
Requires-Dist: tool; extra == "dev"
Provides-Extra: all
Requires-Dist: Main_Package[good,bad]; extra == "all"
Requires-Dist: differently-named; extra == "all"
Provides-Extra: endless
Requires-Dist: main-package[endless,good]; extra == "endless"
Provides-Extra: empty
"""
MODULES = {
    "whole": "print('words')",
    "broken": "raise ImportError('libbroken.so: cannot open\\nmore')",
    "leaving": "raise SystemExit(3)",
    "tool": "raise AssertionError('it is not imported')",
    "old_one": "raise AssertionError('it is not imported')",
    "other_name": "import warnings; warnings.warn('old')",
    "_private": "raise AssertionError('it is not imported')",
}
DISTRIBUTIONS = {
    "whole": ["whole", "unrelated"],
    "broken": ["broken"],
    "leaving": ["leaving"],
    "old-one": ["old_one"],
    "tool": ["tool"],
    "differently-named": ["other_name", "_private"],
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    def add(name, text, files):
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(text)
        (folder / "RECORD").write_text("".join(f"{file},,\n" for file in files))

    add("main-package", METADATA, [])
    for name, modules in DISTRIBUTIONS.items():
        files = [f"{module}/__init__.py" for module in modules] + ["data/deep/file.py"]
        add(name, f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", files)
    for name, code in MODULES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def test_versions_and_their_problems(installed):
    versions, problems = find_versions("main-package")
    assert versions == {
        "python": platform.python_version(),
        "main-package": "1.0",
        "whole": "1.0",
        "absent": None,
        "old-one": "1.0",
    }
    assert problems == ["absent: not installed", "old-one: expected >=2"]
    assert "whole" not in sys.modules


def test_a_broken_package_is_reported(installed, capsys):
    extras = find_extras("main-package")
    assert list(extras) == ["good", "bad", "dev", "all", "endless", "empty"]
    good, bad = extras["good"], extras["bad"]
    assert good == Extra(True, {"whole": Package("1.0")})
    broken = "cannot be imported: ImportError: libbroken.so: cannot open"
    assert bad == Extra(
        False,
        {
            "broken": Package("1.0", broken),
            "leaving": Package("1.0", "cannot be imported: SystemExit: 3"),
            "absent": Package(None, "not installed"),
            "old-one": Package("1.0", "expected >=2"),
        },
    )
    named = {"differently-named": Package("1.0")}
    assert extras["all"] == Extra(False, named | bad.packages | good.packages)
    assert extras["dev"] == Extra(True, good.packages | {"tool": Package("1.0")})
    assert extras["endless"] == good and extras["empty"] == Extra(True, {})
    assert capsys.readouterr() == ("", "")


def test_without_an_installation_nothing_is_raised():
    assert find_versions("no-such-package")[1] == ["no-such-package: not installed"]
    assert find_extras("no-such-package") == {}


def test_pyro_sbp_s_extras_are_those_of_its_metadata():
    declared = metadata.metadata("pyro-sbp").get_all("Provides-Extra")
    extras = find_extras()
    assert list(extras) == declared and {"export", "report"} <= set(declared)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("export", "report"):
        expected = project["optional-dependencies"][name]
        assert list(extras[name].packages) == [Requirement(line).name for line in expected]


def test_pyro_sbp_s_versions_include_what_a_result_depends_on():
    versions, _ = find_versions()
    assert {"python", "pyro-sbp", "torch", "torchvision", "pyro-ppl", "numpy"} <= set(versions)
    assert versions["torch"] == metadata.version("torch")
