"""The wheel has the modules of the tree under one import package, and works once installed."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import distribution as distribution_of
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
EXTRAS = (
    "docs", "executorch", "experiments", "export", "hub", "lightning", "mlflow", "report",
    "tensorboard", "transformers", "wandb",
)  # fmt: skip
#: What an experiment compares with, or a user names, if it is installed; in no extra.
ASKED_FOR = {"jax", "numpyro", "segmentation-models-pytorch", "timm"}
#: Modules that are for those who have installed an extra.
OF_EXTRAS = ("truncated_normal_truth.py", "lightning.py", "transformers.py")
PLACES = {"pyro_sbp": "pyro_sbp", "cli": "pyro_sbp/cli", "experiments": "pyro_sbp/experiments"}


@pytest.fixture(scope="module")
def tracked():
    """The names of the files of the tree that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tracked, tmp_path_factory):
    """A source distribution, built from a copy of the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    program = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, "dist"], cwd=source, check=True, capture_output=True
    )
    (built,) = (source / "dist").glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """A wheel, built from the source distribution."""
    target = tmp_path_factory.mktemp("wheel")
    # No isolation: it would fetch the build tools again.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(target), str(sdist)], check=True)
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_has_the_files_of_the_tree(wheel, tracked):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for name in tracked:
        top, _, rest = name.partition("/")
        if top in PLACES and name.endswith((".py", "py.typed", ".toml")):
            expected.add(f"{PLACES[top]}/{rest}")
    assert inside == expected


def required(lines: Iterable[str]) -> set[str]:
    """The distributions that these requirements need at run time, their own included."""
    found: dict[str, set[str]] = {}  # the extras of each that were followed
    left = [Requirement(line) for line in lines]
    while left:
        requirement = left.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        extras = {"", *requirement.extras} - found.get(name, set())
        found.setdefault(name, set()).update(extras)
        for line in requires(name) or ():
            needed = Requirement(line)
            marker = needed.marker
            if extras and (marker is None or any(marker.evaluate({"extra": e}) for e in extras)):
                left.append(needed)
    return set(found)


@pytest.mark.slow
def test_the_wheel_prunes_with_its_run_time_dependencies_alone(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    # The files of the dependencies that are installed here: no other package can be imported.
    for name in required(declared()):
        for file in distribution_of(name).files:
            if ".." in file.parts or "__pycache__" in file.parts:
                continue
            (packages / file).parent.mkdir(parents=True, exist_ok=True)
            (packages / file).symlink_to(file.locate())
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*pip, "--quiet", "--no-index", str(wheel)], check=True)
    found = subprocess.run(
        [python, "-c", "import importlib.util as u; print([u.find_spec(n) for n in ('pytest', "
         "'matplotlib', 'onnx', 'lightning')])"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert found == "[None, None, None, None]\n"

    command = [environment / "bin" / "pyro-sbp", "train", "--arch", "lenet5", "--dataset", "digits"]
    done = subprocess.run(
        [*command, "--threads", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": os.defpath, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "lenet5-digits-sbp"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["macs"]["ratio"] > 8
    assert summary["error"]["finetuned"] < summary["error"]["dense"] + 1
    made_by = json.loads((run / "recipe.json").read_text())["versions"]["pyro-sbp"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert made_by == project["version"]


def test_importing_the_package_loads_neither_torch_nor_pyro():
    program = (
        "import sys, pyro_sbp; assert not {'torch', 'pyro', 'torchvision'} & set(sys.modules)\n"
        "assert pyro_sbp.__version__; pyro_sbp.load\n"
        "assert not {'pyro', 'scipy', 'sklearn', 'pydantic'} & set(sys.modules)\n"
        "assert set(pyro_sbp.__all__) <= set(dir(pyro_sbp))\n"
        "for name in pyro_sbp.__all__: getattr(pyro_sbp, name)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


installed = cache(packages_distributions)


def distribution(name: str) -> str:
    """The distribution that a module is imported from, normalised."""
    found = {re.sub(r"[-_.]+", "-", d).lower() for d in installed().get(name, [name])}
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in found:  # mlflow is in other distributions too, and need not be installed
        return name
    (other,) = found
    return other


def third_party(nodes: Iterator[ast.AST]) -> set[str]:
    """The packages from elsewhere that these statements import."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    tops = {name.partition(".")[0] for name in names}
    return tops - sys.stdlib_module_names - {"pyro_sbp"}


def declared(*extras: str) -> set[str]:
    """The distributions that the package depends on, with some of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {re.match(r"[\w.-]+", line)[0].replace("_", "-").lower() for line in lines}


def test_the_wheel_imports_what_it_declares():
    undeclared, eager = {}, {}
    for path in (path for folder in PLACES for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        anywhere = {distribution(name) for name in third_party(ast.walk(tree))}
        undeclared[path] = anywhere - declared(*EXTRAS) - ASKED_FOR
        # What an extra brings is imported on use, so that a program can say what is missing.
        if path.name not in OF_EXTRAS:
            at_once = {distribution(name) for name in third_party(iter(tree.body))}
            eager[path] = at_once - declared()
    assert {path: names for path, names in undeclared.items() if names} == {}
    assert {path: names for path, names in eager.items() if names} == {}
    assert len(undeclared) > 100


def test_dev_has_every_extra_but_the_largest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"].keys() == {*EXTRAS, "dev"}
    extras = sorted({*EXTRAS} - {"executorch", "lightning", "mlflow", "transformers"})
    assert f"pyro-sbp[{','.join(extras)}]" in project["optional-dependencies"]["dev"]


@pytest.mark.parametrize(
    ("program", "missing"),
    [
        ("distributions_table accuracy", "mpmath"),
        ("baselines --arch lenet5 --importance taylor 10", "torch_pruning"),
    ],
)
def test_an_experiment_says_which_extra_it_needs(program, missing, monkeypatch, capsys):
    module, *arguments = program.split()
    monkeypatch.setattr("pyro_sbp.experiments.extra.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        import_module(f"pyro_sbp.experiments.{module}").main(arguments)
    words = f"error: this needs {missing}: pip install 'pyro-sbp[experiments]'\n"
    assert capsys.readouterr().err.endswith(words)
