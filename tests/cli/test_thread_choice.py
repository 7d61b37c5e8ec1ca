"""Commands set torch's number of threads, and say so where the machine is busy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run

from pyro_sbp.cli import threads as module
from pyro_sbp.training import threads
from pyro_sbp.training.threads import Cores, ThreadChoice

RECIPE = "dense_epochs = 0\nepochs = 1\nfinetune_epochs = 0\nbatch_size = 256\n"
WARNING = ThreadChoice(1, "free cores", 1, Cores(2, 2)).warning
#: The command line on a machine with six cores; the network notes the threads of its process.
PROGRAM = """
import os, sys
sys.path.insert(0, os.getcwd())
from pyro_sbp.cli import main
from pyro_sbp.training import threads

def measure():
    open(f"measured-{os.getpid()}", "w").close()
    return threads.Cores(6, 0)

threads.measure_cores = measure
os.sched_getaffinity = lambda pid: set(range(6))
main()
"""
NETWORK = """
import os
import torch

class Net(torch.nn.Sequential):
    def __init__(self):
        rank = os.environ.get("LOCAL_RANK")
        with open(f"threads-{rank}", "w") as file:
            file.write(str(torch.get_num_threads()))
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Linear(10, 10))
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def busy(monkeypatch):
    monkeypatch.setattr(threads, "measure_cores", lambda: Cores(2, 2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    (root / "recipe.toml").write_text(RECIPE)
    args = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--device", "cpu"]
    args += ["--recipe", root / "recipe.toml"]
    assert run(*args, "--threads", "1", "--output-dir", root / "run").exit_code == 0
    return root / "run", args


def test_a_run_on_a_busy_machine_says_so_in_one_line(finished, busy, tmp_path):
    _, args = finished
    torch.set_num_threads(2)
    result = run(*args, "--output-dir", tmp_path / "run", "--json")
    assert result.exit_code == 0 and torch.get_num_threads() == 1
    assert result.stderr.splitlines() == [WARNING]
    assert json.loads(result.stdout)["epochs"] == 1
    result = run(*args, "--output-dir", tmp_path / "second", "--json", "--threads", "2")
    assert result.stderr == "" and torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "args", [["bench", "--seconds", "0.01", "--json"], ["prune", "--threshold", "2"], ["report"]]
)
def test_other_commands_that_compute_choose_too(finished, busy, args, monkeypatch):
    torch.set_num_threads(2)
    # A report draws for seconds, with any number of threads.
    monkeypatch.setattr("pyro_sbp.reports.report.write_report", lambda *args: Path("page"))
    result = run(args[0], finished[0], *args[1:])
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0] == WARNING and torch.get_num_threads() == 1
    if args[0] == "bench":
        rows = json.loads(result.stdout)
        assert {row["threads"] for row in rows} == {1}


def test_bench_measures_one_thread_and_the_chosen_number(finished, monkeypatch):
    monkeypatch.setattr(threads, "measure_cores", lambda: Cores(3, 1))
    result = run("bench", finished[0], "--seconds", "0.01", "--batch-size", "1", "--json")
    assert [row["threads"] for row in json.loads(result.stdout)[:2]] == [1, 2]
    assert "\nmeasuring for about " in result.stderr and WARNING not in result.stderr


@pytest.mark.slow
def test_each_of_two_processes_gets_its_share(finished, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "network.py").write_text(NETWORK)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    arguments = ["train", "--arch", "network:Net", "--dataset", "digits", "--device", "cpu"]
    arguments += ["--recipe", "recipe.toml", "--devices", "2", "--output-dir", "run"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Only the first process measures: the others would find it busy.
    assert len(list(tmp_path.glob("measured-*"))) == 1
    assert [(tmp_path / f"threads-{i}").read_text() for i in range(2)] == ["3", "3"]
    assert "the machine is busy" not in done.stderr


def test_only_the_first_process_warns(busy, monkeypatch, capsys):
    assert module.threads_to_use(None) == 1
    assert capsys.readouterr().err == f"{WARNING}\n"
    monkeypatch.setattr(module, "is_first", lambda: False)
    assert module.threads_to_use(None) == 1
    assert capsys.readouterr().err == ""
