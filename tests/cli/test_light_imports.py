"""Help and refusals appear at once, because nothing heavy is imported for them."""

import json
import subprocess
import sys

import pytest

#: Packages and modules that take long to import, or that only single commands need.
HEAVY = {
    "asyncio",
    "filelock",
    "lightning_fabric",
    "matplotlib",
    "multiprocessing",
    "numpy",
    "onnx",
    "packaging",
    "pyro",
    "safetensors",
    "scipy",
    "sklearn",
    "ssl",
    "torch",
    "torchvision",
    "tqdm",
    "urllib.request",
}
HELP = [["--help"], *([name, "--help"] for name in ("train", "bench", "report", "doctor"))]
REFUSED = [
    ["--nonsense"],
    ["train", "--nonsense"],
    ["train", "--epochs", "x"],
    ["train", "--arch", "lenet6"],
    ["train", "--arch", "lenet5", "--method", "spb"],
    ["train", "--arch", "lenet5", "--device", "tpu"],
    ["train", "--arch", "torchvision.models:resnet18", "--dataset", "minst"],
    ["train", "--resume", "nowhere"],
    ["inspect", "nowhere"],
    ["prune", "nowhere", "--threshold", "2"],
    ["bench"],
    ["export", "nowhere", "--format", "onnx"],
    ["report", "nowhere"],
]
VERSION = ["--version"]
#: A new interpreter that runs every command in a fork of itself.
PROGRAM = """
import json, os, sys
import pyro_sbp.cli.commands
from pyro_sbp.cli import main

for index, args in enumerate(json.loads(sys.argv[1])):
    process = os.fork()
    if process == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{index}.{name}", os.O_CREAT | os.O_WRONLY), number)
        sys.argv = ["pyro-sbp", *args]
        try:
            main()
        finally:
            print("imported:", *sys.modules, file=sys.stderr)
        sys.exit()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with open(f"{index}.status", "w") as file:
        file.write(str(status))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The exit status, the lines on stderr and the imported modules, for the words of a command."""
    root = tmp_path_factory.mktemp("commands")
    commands = [*HELP, *REFUSED, VERSION]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(commands)]
    subprocess.run(command, check=True, cwd=root)
    found = {}
    for index, args in enumerate(commands):
        *lines, last = (root / f"{index}.stderr").read_text().splitlines()
        assert last.startswith("imported: ") and "Traceback" not in "".join(lines)
        status = int((root / f"{index}.status").read_text())
        found[tuple(args)] = status, lines, set(last.split())
    return found


@pytest.mark.parametrize("args", HELP, ids=" ".join)
def test_the_help_imports_nothing_heavy(args, imported):
    status, lines, modules = imported[tuple(args)]
    assert status == 0 and lines == [] and modules & HEAVY == set()


@pytest.mark.parametrize("args", REFUSED, ids=" ".join)
def test_refusals_import_nothing_heavy(args, imported):
    status, lines, modules = imported[tuple(args)]
    assert status == 2 and len(lines) == 1 and modules & HEAVY == set()


def test_the_version_imports_no_torch(imported):
    status, lines, modules = imported[tuple(VERSION)]
    assert status == 0 and lines == [] and not {"torch", "pyro", "numpy"} & modules
