"""What the tests of the command line have in common."""

import atexit
import contextlib
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyro_sbp.cli import cli
from pyro_sbp.training import train as training

#: A recipe of seconds on digits, and what a method needs besides for its noise to get somewhere.
QUICK = """
dense_epochs = 3
epochs = 6
finetune_epochs = 1
batch_size = 64
noise_learning_rate = 0.1
crop = 1
"""
METHODS = {
    "sbp": "init_log_scale = -1.0",
    "sparse-vd": "init_log_scale = -4.0\nkl_scale = 0.3",
    "rbp": "init_log_scale = -1.0\nprior_scale = 5.0",
}


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)


@contextlib.contextmanager
def stops_after(steps):
    """Inside, a run is asked to stop after some steps."""
    train, left = training.train, steps

    def stop():
        nonlocal left
        left -= 1
        return left <= 0

    def stopped(request, data, directory, watch, _, *rest):
        return train(request, data, directory, watch, stop, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", stopped)
        yield


@functools.cache
def _trained(method):
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    (root / "quick.toml").write_text(QUICK + METHODS[method])
    args = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--method", method]
    args += ["--recipe", root / "quick.toml", "--device", "cpu"]
    result = run(*args, "--seed", 7, "--output-dir", root / "run")
    assert result.exit_code == 0, result.output
    return root / "run", result, args


def train_quickly(method, root):
    """A run directory under `root`, the result of the command that made it, and its arguments.

    Every call gives a copy of the same run.
    """
    directory, result, args = _trained(method)
    return shutil.copytree(directory, root / "run"), result, args
