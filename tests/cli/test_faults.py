"""What breaks a run from outside, and what is left of it: one line, a status, and all earlier work.

Other faults are in test_train.py (signals, parameters that are not finite, damaged checkpoints) and
test_streamed.py (images that cannot be decoded, workers that are killed).
"""

import contextlib
import json
import os
import random
import resource
import signal
import time

import pytest
import torch
from click.testing import CliRunner
from helpers import METHODS, stops_after
from warm_processes import COMMAND_LINE, WarmProcess

from pyro_sbp.cli import cli
from pyro_sbp.cli.stopping import Stopped
from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.gates.nested import tensors_of
from pyro_sbp.training.checkpoints import Checkpoint
from pyro_sbp.training.files import lock

RECIPE = """
dense_epochs = 2
epochs = 3
finetune_epochs = 1
batch_size = 64
kl_scale = 30.0
"""
#: How often a run is killed; PYRO_SBP_KILLS=20 for the long proof.
KILLS = max(3, int(os.environ.get("PYRO_SBP_KILLS", "3")))
EPOCHS = 2 * KILLS
#: A program that kills itself at the n-th sync of a file, renaming of one, or step.
SELF_KILLING = """
import os, signal, sys, torch
from pyro_sbp.cli import main

name, left = sys.argv[1], int(sys.argv[2])
owner = torch.optim.Adam if name == "step" else os
function = getattr(owner, name)

def dying(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)

setattr(owner, name, dying)
sys.argv = ["pyro-sbp", *sys.argv[3:]]
main()
"""
#: A program whose steps take a minute each from the 60th on.
SLOW = """
import sys, time, torch
from pyro_sbp.cli import main

step, count = torch.optim.Adam.step, 0

def slow(self, *args):
    global count
    count += 1
    if count > 60:
        print("slow", file=sys.stderr, flush=True)
        time.sleep(60)
    return step(self, *args)

torch.optim.Adam.step = slow
main()
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "quick.toml"
    path.write_text(RECIPE)
    return ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--recipe", str(path),
            "--device", "cpu", "--threads", "1"]  # fmt: skip


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def wait_for(process, word):
    """Read what a program says up to a line with a word."""
    lines = []
    while not lines or word not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1], f"it ended: {lines}"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(method, marks=[] if method == "sbp" else pytest.mark.slow)
        for method in METHODS
    ],
)
def undisturbed(request, arguments, tmp_path_factory):
    """A run that nothing disturbs, of every method, and its arguments."""
    directory = tmp_path_factory.mktemp("run") / "run"
    arguments = [*arguments, "--method", request.param, "--epochs", EPOCHS, "--json"]
    result = run(*arguments, "--output-dir", directory)
    assert result.exit_code == 0, result.output
    return directory, arguments


@pytest.fixture
def stopped(arguments, tmp_path):
    """A run that was stopped in its second epoch."""
    with stops_after(31), pytest.raises(Stopped):
        run(*arguments, "--output-dir", tmp_path / "run")
    return tmp_path / "run"


def files(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


def parameters(directory):
    saved = Checkpoint.read(directory / "checkpoint.pt")
    yield from tensors_of([saved.finished, saved.current])


def one_line(result, status):
    assert result.exit_code == status, result.output
    lines = result.stderr.strip().splitlines()
    lines = [line for line in lines if "loss" not in line and ": method " not in line]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    return lines[0]


@contextlib.contextmanager
def small_disk(size):
    """No file may grow beyond `size` bytes: the system refuses the write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_killed_at_any_instant_a_run_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    undisturbed, arguments = undisturbed
    directory = tmp_path / "run"
    args = [*arguments, "--output-dir", directory]
    chance = random.Random(0)
    # Files are written in one way for all methods, but each has its own state after a step.
    first = 0 if "sbp" in arguments else 2
    for kill in range(first, KILLS):
        if (directory / "recipe.json").exists():
            args = ["train", "--resume", directory, "--threads", "1", "--json"]
        kind = ("fsync", "replace", "step")[kill % 3]
        # Of 23 steps an epoch, and two files after each.
        count = chance.randint(1, 40) if kind == "step" else chance.randint(1, 5)
        with WarmProcess(SELF_KILLING, kind, count, *args) as process:
            assert process.wait(120) == -signal.SIGKILL, process.stderr.read()
    result = run("train", "--resume", directory, "--threads", "1")
    assert result.exit_code == 0, result.output
    for ours, expected in zip(parameters(directory), parameters(undisturbed), strict=True):
        assert torch.equal(ours, expected)
    for name in ("model.safetensors", "network.json", "units.json"):
        path = f"pruned/{name}"
        assert (directory / path).read_bytes() == (undisturbed / path).read_bytes()


def test_a_full_disk_loses_nothing(stopped):
    before = files(stopped)
    with small_disk(100_000):
        line = one_line(run("train", "--resume", stopped), 1)
    assert (
        "checkpoint.pt: File too large" in line
        and f"resume with `pyro-sbp train --resume {stopped}`" in line
    )
    after = files(stopped)
    assert after["checkpoint.pt"] == before["checkpoint.pt"] and after.keys() == before.keys()
    assert run("train", "--resume", stopped).exit_code == 0


def test_a_full_disk_at_the_very_end_can_be_gone_on_from(undisturbed, tmp_path):
    undisturbed, _ = undisturbed
    for name in ("recipe.json", "checkpoint.pt", "metrics.jsonl"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    with small_disk(20_000):
        line = one_line(run("train", "--resume", tmp_path), 1)
    assert "cannot write" in line and "pruned" in line and "--resume" in line
    assert not (tmp_path / "pruned").exists() and not (tmp_path / "summary.json").exists()
    assert run("train", "--resume", tmp_path).exit_code == 0
    name = "pruned/model.safetensors"
    assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_directory_is_written_by_one_run_at_a_time(stopped):
    before = files(stopped)
    with lock(stopped):
        line = one_line(run("train", "--resume", stopped), 2)
    assert line == f"Error: another process is writing {stopped}"
    assert files(stopped) == before
    args = ("train", "--resume", stopped, "--threads", "1")
    with WarmProcess(COMMAND_LINE, *args) as first:
        wait_for(first, "gated")
        line = one_line(run("train", "--resume", stopped), 2)
        assert line == f"Error: another process is writing {stopped}"
        first.stderr.read()
        assert first.wait(60) == 0


def test_a_second_signal_stops_at_once_and_keeps_the_checkpoint(arguments, tmp_path):
    args = [*arguments, "--epochs", "1000", "--output-dir", tmp_path / "run"]
    with WarmProcess(SLOW, *args) as process:
        wait_for(process, "slow")
        saved = (tmp_path / "run" / "checkpoint.pt").read_bytes()
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(20) == 128 + signal.SIGINT
    assert rest.strip().splitlines() == [
        "stopped at once, without the steps since the last checkpoint; "
        f"resume with `pyro-sbp train --resume {tmp_path / 'run'}`"
    ]
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == saved


EXPLOSIVE = """
from torch import nn

class Explosive(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 20), nn.Linear(20, 20), nn.Linear(20, 10))

    def forward(self, x):
        flatten, first, second, third = self
        return third(second(first(flatten(x)).exp()).exp())
"""


def test_a_learning_rate_that_explodes_is_told(arguments, tmp_path, monkeypatch):
    (tmp_path / "explosive.py").write_text(EXPLOSIVE)
    monkeypatch.syspath_prepend(tmp_path)
    args = [*arguments, "--arch", "explosive:Explosive", "--output-dir", tmp_path / "run"]
    line = one_line(run(*args, "--learning-rate", "1"), 1)
    assert "in epoch 1 of phase 'dense': a lower learning rate may help" in line
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_data_that_are_not_finite_are_told(arguments, tmp_path, monkeypatch):
    def poisoned(*args):
        data = load_dataset(*args)
        images = data.train.images.float()
        images[700] = torch.nan
        object.__setattr__(data.train, "images", images)
        return data

    monkeypatch.setattr("pyro_sbp.training.job.load_dataset", poisoned)
    line = one_line(run(*arguments, "--output-dir", tmp_path / "run"), 1)
    assert "not finite in epoch 1 of phase 'dense'" in line
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("where", ["/proc/run", "/sys/run"])
def test_a_directory_that_cannot_be_written_is_refused(arguments, where):
    if not os.path.isdir(os.path.dirname(where)):
        pytest.skip(f"{os.path.dirname(where)} is of Linux")
    assert "cannot write" in one_line(run(*arguments, "--output-dir", where), 2)


def test_a_gate_that_would_lose_all_its_units_is_held_and_named(arguments, tmp_path):
    (tmp_path / "wide.toml").write_text(RECIPE + "init_log_scale = 1.0\nthreshold = 1e4\n")
    recipe = ["--recipe", tmp_path / "wide.toml", "--output-dir", tmp_path / "run"]
    result = run(*arguments, *recipe)
    assert result.exit_code == 0, result.output
    assert "(all under the threshold: fc1_input, fc1, fc2)" in result.stderr
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[2])
    assert line["phase"] == "gated" and line["held"] == ["fc1_input", "fc1", "fc2"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["held"] == ["fc1_input", "fc1", "fc2"] and all(
        unit["kept"] >= 1 for unit in summary["units"]
    )
    for gate in summary["held"]:
        assert (
            f"all units of {gate} are under the threshold: only the best is kept" in result.stdout
        )


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload-ran",)


@pytest.mark.parametrize("damage", ["truncated", "of another recipe", "with a payload"])
def test_a_checkpoint_is_trusted_with_nothing(stopped, damage, monkeypatch):
    monkeypatch.chdir(stopped)
    path = stopped / "checkpoint.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "with a payload":
        torch.save({"request": Payload()}, path)
    else:
        recipe = json.loads((stopped / "recipe.json").read_text())
        recipe["seed"] = 1
        (stopped / "recipe.json").write_text(json.dumps(recipe))
    before = files(stopped)
    line = one_line(run("train", "--resume", stopped), 2)
    assert "checkpoint.pt is damaged" in line or "belongs to another request" in line
    assert files(stopped) == before
