"""A run on two processes is the run on one: by --devices, and under torchrun."""

import csv
import itertools
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from helpers import METHODS
from PIL import Image
from warm_processes import COMMAND_LINE, WarmProcess

import pyro_sbp as sbp
from pyro_sbp.cli import cli
from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.gates.nested import tensors_of
from pyro_sbp.recipes import Request, SBPRecipe
from pyro_sbp.training.checkpoints import Checkpoint
from pyro_sbp.training.files import lock

RECIPE = """
dense_epochs = 1
epochs = 1
finetune_epochs = 1
batch_size = 101
kl_scale = 30.0
noise_learning_rate = 1e-9
"""
PYRO_SBP = [sys.executable, "-m", "pyro_sbp.cli"]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("-m", "pyro_sbp.cli"),
]


#: What a scheduler, a notebook or an earlier process group may have left in the environment.
STRAYS = {
    "RANK": "abc",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "",
    "NODE_RANK": "3",
    "MASTER_ADDR": "host.invalid",
    "MASTER_PORT": "-",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "5",
}


def start(command, *arguments, env=None, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment |= env or {}
    return subprocess.Popen(
        [*command, *arguments], env=environment, text=True, stderr=subprocess.PIPE, **options
    )


def start_both(*arguments):
    """Two processes of one run, which have their group from the variables of torchrun."""
    port = free_port()
    group = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return [
        WarmProcess(
            COMMAND_LINE,
            *arguments,
            environment={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def free_port():
    """A port on which the first process waits for the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_on_one(*arguments):
    result = CliRunner().invoke(cli, [*arguments, "--threads", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same request on one process, on two, and on two with the variables of torchrun.

    The environment of the two that --devices starts has stray variables of a process group.
    """
    root = tmp_path_factory.mktemp("runs")
    (root / "recipe.toml").write_text(RECIPE)
    arguments = ["train", "--arch", "lenet-300-100", "--dataset", "digits"]
    arguments += ["--recipe", str(root / "recipe.toml"), "--precision", "64-true"]
    arguments += ["--logger", "csv", "--output-dir"]
    train_on_one(*arguments, str(root / "one"))
    with start(
        PYRO_SBP,
        *arguments,
        str(root / "two"),
        "--devices",
        "2",
        env=STRAYS,
        stdout=subprocess.PIPE,
    ) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "dense 1/1" in errors and "gated 1/1" in errors
    assert f"run directory: {root / 'two'}" in output
    first, second = start_both(*arguments, root / "torchrun")
    with first, second:
        errors = first.stderr.read() + second.stderr.read()
        assert first.wait(60) == second.wait(60) == 0, errors
    return {name: root / name for name in ("one", "two", "torchrun")}


def dense(run):
    return Checkpoint.read(run / "checkpoint.pt").finished[0]["module"]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    """Step and loss of every epoch."""
    return [(step, line["loss"]) for step, line in enumerate(metrics(run), 1)]


def logged(run):
    """Step and loss of every epoch in the CSV file."""
    with open(run / "logs" / "csv" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    return [(int(row["step"]), float(row["loss"])) for row in rows]


@pytest.mark.parametrize("name", ["two", "torchrun"])
def test_without_noise_two_processes_reach_the_parameters_of_one(runs, name):
    one, two = dense(runs["one"]), dense(runs[name])
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-10)
    first, second = metrics(runs["one"])[0], metrics(runs[name])[0]
    assert second["nll"] == pytest.approx(first["nll"], rel=1e-6)
    assert second["error"] == pytest.approx(first["error"], rel=1e-6)


@pytest.mark.parametrize("name", ["two", "torchrun"])
def test_with_noise_the_kl_counts_once_and_each_draws_its_own(runs, name):
    one, two = metrics(runs["one"])[1], metrics(runs[name])[1]
    assert one["phase"] == two["phase"] == "gated"
    assert two["weighted_kl"] == pytest.approx(one["weighted_kl"], rel=1e-6)
    assert two["kl"] == pytest.approx(one["kl"], rel=1e-6)
    assert two["nll"] != one["nll"]
    random = torch.load(runs[name] / "checkpoint.pt", weights_only=True)["random"]
    assert len(random) == 2 and not torch.equal(random[0]["cpu"], random[1]["cpu"])


def test_they_write_one_run_directory(runs):
    for name in ("two", "torchrun"):
        assert {path.name for path in runs[name].iterdir()} == {
            path.name for path in runs["one"].iterdir()
        }
        assert (runs[name] / "pruned" / "model.safetensors").is_file()
        assert logged(runs[name]) == losses(runs[name])
        assert json.loads((runs[name] / "recipe.json").read_text())["devices"] == 2
        summary = json.loads((runs[name] / "summary.json").read_text())
        assert summary["equivalence"]["max_rel_diff_float64"] < 1e-10


def test_stray_variables_of_a_process_group_change_nothing(runs):
    lines = [{**line, "seconds": 0} for line in metrics(runs["torchrun"])]
    assert [{**line, "seconds": 0} for line in metrics(runs["two"])] == lines


def test_torchrun_s_variables_have_to_be_whole(tmp_path):
    arguments = ["train", "--arch", "lenet5", "--dataset", "digits"]
    with start(PYRO_SBP, *arguments, env={"TORCHELASTIC_RUN_ID": "none"}, cwd=tmp_path) as process:
        errors = process.stderr.read()
        assert process.wait(60) == 2
    assert errors == (
        "Error: TORCHELASTIC_RUN_ID is set, so torchrun started this command, but RANK is ''; "
        "expected an integer >= 0\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "sbp"])
def test_other_methods_run_on_two_processes_too(method, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("epochs = 1\nf", "epochs = 3\nf"))
    arguments = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--method", method]
    arguments += ["--recipe", str(tmp_path / "recipe.toml"), "--precision", "64-true"]
    train_on_one(*arguments, "--output-dir", str(tmp_path / "one"))
    out = str(tmp_path / "two")
    with start(PYRO_SBP, *arguments, "--devices", "2", "--output-dir", out) as process:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    one, two = (metrics(tmp_path / name)[1] for name in ("one", "two"))
    # The KL counts once, and the noise is each one's own.
    assert two["weighted_kl"] == pytest.approx(one["weighted_kl"], rel=1e-3)
    assert two["nll"] != one["nll"] and two["nll"] == pytest.approx(one["nll"], rel=0.2)


@pytest.mark.slow
def test_a_run_resumes_on_as_many_processes_as_it_had(runs, tmp_path):
    recipe = runs["two"] / "recipe.json"
    (tmp_path / "recipe.json").write_text(recipe.read_text())
    process = start([*TORCHRUN[:5], "1", *TORCHRUN[6:]], "train", "--resume", str(tmp_path))
    assert "the run is for 2 devices, but torchrun started 1" in process.communicate(timeout=120)[1]
    assert process.returncode != 0


@pytest.mark.parametrize(
    ("arch", "options"),
    # On a processor, convolutions in bfloat16 take six times as long.
    [("lenet5", ["--channels-last"]), ("lenet-300-100", ["--precision", "bf16-mixed"])],
)
def test_layout_and_precision_change_the_speed_and_little_else(arch, options, tmp_path):
    (tmp_path / "recipe.toml").write_text("dense_epochs = 6\nepochs = 1\nfinetune_epochs = 1\n")
    arguments = ["train", "--arch", arch, "--dataset", "digits", "--threads", "1"]
    arguments += ["--recipe", str(tmp_path / "recipe.toml"), "--output-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(cli, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["equivalence"]["max_rel_diff_float64"] < 1e-10
    assert summary["error"]["finetuned"] < 15
    small = sbp.load(tmp_path / "run" / "pruned").eval()
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in small.parameters())
    x, y = load_dataset("digits", image_size=28).test.batch(slice(None))
    error = 100 * float((small(x).argmax(1) != y).float().mean())
    # Errors are measured in float32, whatever the training multiplied in.
    assert error == pytest.approx(summary["error"]["finetuned"], abs=1e-4)


@pytest.mark.slow
def test_torchrun_starts_the_same_run(runs, tmp_path):
    arguments = ["train", "--arch", "lenet-300-100", "--dataset", "digits"]
    arguments += ["--recipe", str(runs["two"].parent / "recipe.toml"), "--precision", "64-true"]
    arguments += ["--json", "--output-dir", str(tmp_path / "run")]
    with start(TORCHRUN, *arguments, stdout=subprocess.PIPE) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(output) == json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [{**line, "seconds": 0} for line in metrics(runs["two"])]
    assert [{**line, "seconds": 0} for line in metrics(tmp_path / "run")] == lines


@pytest.mark.slow
def test_two_processes_that_are_stopped_go_on_to_the_same_end(runs, tmp_path):
    recipe = str(runs["two"].parent / "recipe.toml")
    arguments = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--recipe", recipe]
    arguments += ["--precision", "64-true", "--devices", "2", "--output-dir", str(tmp_path / "run")]
    arguments += ["--logger", "csv"]
    with start(PYRO_SBP, *arguments) as process:
        while "dense 1/1" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read().strip().splitlines()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert rest == [f"stopped; resume with `pyro-sbp train --resume {tmp_path / 'run'}`"]
    with start(PYRO_SBP, "train", "--resume", str(tmp_path / "run"), "--json") as process:
        assert process.wait(120) == 0, process.stderr.read()
    states = [
        list(tensors_of(Checkpoint.read(run / "checkpoint.pt").finished))
        for run in (runs["two"], tmp_path / "run")
    ]
    assert all(torch.equal(first, second) for first, second in zip(*states, strict=True))
    lines = [{**line, "seconds": 0} for line in metrics(runs["two"])]
    assert [{**line, "seconds": 0} for line in metrics(tmp_path / "run")] == lines
    assert logged(tmp_path / "run") == losses(tmp_path / "run")


def test_what_only_the_first_process_finds_ends_all_in_one_line(tmp_path):
    request = Request("lenet-300-100", "digits", SBPRecipe(), devices=2, device="cpu")
    (tmp_path / "recipe.json").write_text(json.dumps(request.to_dict()))
    with lock(tmp_path):
        first, second = start_both("train", "--resume", tmp_path)
        with first, second:
            errors = first.stderr.read() + second.stderr.read()
            assert first.wait(60) == 2 and second.wait(60) != 0
    assert errors == f"Error: another process is writing {tmp_path}\n"


@pytest.mark.slow
def test_what_only_another_process_finds_is_told_by_it(tmp_path):
    for part, name in itertools.product(("train", "test"), ("a", "b")):
        (tmp_path / "images" / part / name).mkdir(parents=True)
        for i in range(10):
            image = Image.new("RGB", (28, 28), (9 * i, 0, 0))
            image.save(tmp_path / "images" / part / name / f"{i}.png")
    # By the order of seed 0 and two processes, in the share of the second.
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:8]
    index = int(order[1])
    path = tmp_path / "images" / "train" / "ab"[index // 10] / f"{index % 10}.png"
    path.write_bytes(b"no image")
    (tmp_path / "recipe.toml").write_text("dense_epochs = 1\nepochs = 1\nbatch_size = 8\n")
    arguments = ["train", "--arch", "lenet5", "--dataset", f"folder:{tmp_path / 'images'}"]
    arguments += ["--recipe", str(tmp_path / "recipe.toml"), "--workers", "1", "--devices", "2"]
    first, second = start_both(*arguments, "--output-dir", str(tmp_path / "run"))
    with first, second:
        # The other process ends as soon as it has found the file, and the first one then.
        found, ended = second.stderr.read(), first.stderr.read()
        assert second.wait(60) == 2 and first.wait(60) == 1
    assert f"Error: {path} cannot be read as an image" in found and "Traceback" not in found
    assert "Error: another process of this run has ended; resume with" in ended
    assert "Traceback" not in ended


def test_a_batch_too_small_for_all_is_refused():
    arguments = ["train", "--arch", "lenet5", "--batch-size", "3", "--devices", "2"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2 and "at least two examples for each of 2 devices" in result.stderr
