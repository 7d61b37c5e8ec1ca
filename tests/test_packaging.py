"""The wheel holds what the tree holds, under one import package."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = (
    "docs", "experiments", "export", "hub", "lightning", "mlflow", "report", "tensorboard",
    "transformers", "wandb",
)  # fmt: skip
#: What an experiment compares with, or a user names, if it is installed; in no extra.
ASKED_FOR = {"jax", "numpyro", "timm"}
#: Modules that are for those who have installed an extra.
OF_EXTRAS = ("truncated_normal_truth.py", "lightning.py", "transformers.py")
PLACES = {"pyro_sbp": "pyro_sbp", "cli": "pyro_sbp/cli", "experiments": "pyro_sbp/experiments"}


def test_the_wheel_has_the_files_of_the_tree(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    tracked = [name for name in tracked if (ROOT / name).is_file()]
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    # No isolation: it would fetch the build tools again.
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
            str(source),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for name in tracked:
        top, _, rest = name.partition("/")
        if top in PLACES and name.endswith((".py", "py.typed", ".toml")):
            expected.add(f"{PLACES[top]}/{rest}")
    assert inside == expected


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
    extras = sorted({*EXTRAS} - {"lightning", "mlflow", "transformers"})
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
