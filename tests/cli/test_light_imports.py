"""Help and refusals appear at once, because nothing heavy is imported for them."""

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
PROGRAM = """
import sys
sys.argv = ["pyro-sbp", *sys.argv[1:]]
from pyro_sbp.cli import main
try:
    main()
finally:
    print("imported:", *sys.modules, file=sys.stderr)
"""


def imported(args, cwd):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    *lines, last = done.stderr.splitlines()
    assert last.startswith("imported: ") and "Traceback" not in done.stderr
    return done.returncode, lines, set(last.split())


@pytest.mark.parametrize(
    "args",
    [["--help"], *([name, "--help"] for name in ("train", "bench", "report", "doctor"))],
    ids=" ".join,
)
def test_the_help_imports_nothing_heavy(args, tmp_path):
    status, lines, modules = imported(args, tmp_path)
    assert status == 0 and lines == [] and modules & HEAVY == set()


@pytest.mark.parametrize(
    "args",
    [
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
    ],
    ids=" ".join,
)
def test_refusals_import_nothing_heavy(args, tmp_path):
    status, lines, modules = imported(args, tmp_path)
    assert status == 2 and len(lines) == 1 and modules & HEAVY == set()


def test_the_version_imports_no_torch(tmp_path):
    status, lines, modules = imported(["--version"], tmp_path)
    assert status == 0 and lines == [] and not {"torch", "pyro", "numpy"} & modules
