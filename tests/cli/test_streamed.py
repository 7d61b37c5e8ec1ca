"""pyro-sbp train on an image folder that stays on disk, standardized and augmented."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run, stops_after
from PIL import Image

from pyro_sbp.cli.stopping import Stopped
from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.datasets.streaming import default_workers
from pyro_sbp.deployment import loading
from pyro_sbp.training.checkpoints import Checkpoint

WORKERS = min(2, default_workers())
RECIPE = """
dense_epochs = 1
epochs = 3
finetune_epochs = 1
batch_size = 16
init_log_scale = -1.0
noise_learning_rate = 0.1
standardize = true
crop = 2
flip = true
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder whose classes differ in colour, and a recipe."""
    root = tmp_path_factory.mktemp("streamed")
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 12)):
        for label, name in enumerate(("red", "green", "blue")):
            (root / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(40, 120, (28, 28, 3), dtype=np.uint8)
                pixels[..., label] += np.uint8(30)
                Image.fromarray(pixels).save(root / "data" / part / name / f"{i}.png")
    (root / "recipe.toml").write_text(RECIPE)
    return root


def arguments(root, *more):
    args = ["train", "--arch", "lenet-300-100", "--dataset", f"folder:{root / 'data'}"]
    return [*args, "--recipe", root / "recipe.toml", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def held(root):
    """A run that has all images in memory."""
    result = run(*arguments(root, "--workers", 0, "--output-dir", root / "held"))
    assert result.exit_code == 0 and "on disk" not in result.stderr, result.output
    return root / "held"


def assert_same_end(one, other):
    first, second = (json.loads((run / "summary.json").read_text()) for run in (one, other))
    assert {**first, "train_seconds": 0} == {**second, "train_seconds": 0}
    states = [Checkpoint.read(run / "checkpoint.pt") for run in (one, other)]
    for name, value in states[0].current["module"].items():
        assert torch.equal(value, states[1].current["module"][name]), name
    assert torch.equal(*(state.random[0]["cpu"] for state in states))


def test_streamed_or_not_a_run_ends_the_same(root, held, tmp_path):
    result = run(*arguments(root, "--workers", WORKERS, "--output-dir", tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert f"images stay on disk, read by {WORKERS} workers" in result.stderr
    assert_same_end(held, tmp_path / "run")
    assert (tmp_path / "run/recipe.json").read_text() == (held / "recipe.json").read_text()


def test_it_goes_on_within_an_epoch(root, held, tmp_path):
    with stops_after(3), pytest.raises(Stopped):  # within the dense phase
        run(*arguments(root, "--workers", WORKERS, "--output-dir", tmp_path / "run"))
    with stops_after(15), pytest.raises(Stopped):  # at the end of an epoch of 6 steps, with noise
        run("train", "--resume", tmp_path / "run", "--workers", WORKERS)
    assert run("train", "--resume", tmp_path / "run", "--workers", WORKERS).exit_code == 0
    assert_same_end(held, tmp_path / "run")


def test_the_network_tells_what_its_images_are_standardized_by(root, held):
    data = load_dataset(f"folder:{root / 'data'}").standardized()
    told = json.loads((held / "pruned/network.json").read_text())["standardize"]
    assert told == data.train.standardization.to_dict()
    summary = json.loads((held / "summary.json").read_text())
    assert summary["standardize"] == told
    x, y = data.test.batch(slice(None))
    error = 100 * float((loading.load(held / "pruned")(x).argmax(1) != y).float().mean())
    assert error == pytest.approx(summary["error"]["finetuned"], abs=1e-4)
    again = run("prune", held, "--threshold", 1, "--json")
    assert again.exit_code == 0, again.output
    pruned = json.loads(again.stdout)
    assert pruned["error"] == {**summary["error"], "finetuned": None}
    assert pruned["standardize"] == told


def test_what_was_not_standardized_tells_nothing(root, tmp_path):
    (tmp_path / "plain.toml").write_text("dense_epochs = 0\nepochs = 1\nfinetune_epochs = 0\n")
    args = arguments(root, "--recipe", tmp_path / "plain.toml", "--output-dir", tmp_path / "run")
    assert run(*args).exit_code == 0
    for name in ("summary.json", "pruned/network.json"):
        assert "standardize" not in json.loads((tmp_path / "run" / name).read_text())


@pytest.fixture
def stopped(root, tmp_path):
    """A folder of one's own, and a run on it that was stopped in its second epoch."""
    shutil.copytree(root / "data", tmp_path / "data")
    shutil.copy(root / "recipe.toml", tmp_path)
    with stops_after(8), pytest.raises(Stopped):
        run(*arguments(tmp_path, "--workers", WORKERS, "--output-dir", tmp_path / "run"))
    return tmp_path / "run"


def test_a_damaged_image_ends_the_run_in_one_line(stopped, tmp_path):
    # It is standardized on training images only, so this one is met at the end of the epoch.
    (tmp_path / "data/test/red/11.png").write_bytes(b"no image")
    before = (stopped / "checkpoint.pt").read_bytes()
    result = run("train", "--resume", stopped, "--workers", WORKERS)
    first, last = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and first.startswith("images stay on disk")
    assert "red/11.png cannot be read as an image" in last
    assert (stopped / "checkpoint.pt").read_bytes() == before


@pytest.mark.usefixtures("files_of_a_killed_worker")
def test_a_killed_worker_ends_the_run_in_one_line(stopped, monkeypatch):
    from pyro_sbp.training import train as training

    def kill_worker():
        multiprocessing.active_children()[0].kill()
        return False

    before = (stopped / "checkpoint.pt").read_bytes()
    train = training.train
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", lambda *rest: train(*rest[:4], kill_worker))
        result = run("train", "--resume", stopped, "--workers", WORKERS)
    assert result.exit_code == 1
    _, last = result.stderr.strip().splitlines()
    assert last.startswith("Error: a process that reads images died (")
    assert last.endswith(f"; resume with `pyro-sbp train --resume {stopped}`")
    assert (stopped / "checkpoint.pt").read_bytes() == before
    assert run("train", "--resume", stopped, "--workers", WORKERS).exit_code == 0


def workers_of(process):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if found:
            return found
    raise AssertionError("no worker was seen")


@pytest.mark.slow
def test_ctrl_c_for_the_whole_group_leaves_a_checkpoint(root, tmp_path):
    more = ("--epochs", 1000, "--workers", WORKERS, "--output-dir", tmp_path / "run")
    command = [sys.executable, "-c", "from pyro_sbp.cli import main; main()"]
    command += map(str, arguments(root, *more))
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        for line in process.stderr:
            if "gated 1/1000" in line:
                break
        workers = workers_of(process)
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 128 + signal.SIGINT
    assert rest.splitlines()[-1].startswith("stopped; resume with `pyro-sbp train --resume ")
    assert "Traceback" not in rest and (tmp_path / "run" / "checkpoint.pt").exists()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
