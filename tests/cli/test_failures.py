"""A failure is one line and an exit status; --debug shows its traceback."""

import errno
import os
import signal
import subprocess
import sys

import click
import pytest
import torch
from click.testing import CliRunner
from helpers import run

from pyro_sbp.cli.failures import CommandGroup
from pyro_sbp.deployment.exporting import ExportError
from pyro_sbp.errors import OtherProcessError, RequestError, SingleProcessError
from pyro_sbp.pruning.exactness import EquivalenceError
from pyro_sbp.training.processes import OWN_GROUP

HINT = "; run again with --debug for the traceback"
UNEXPECTED = [
    (KeyError("x"), "unexpected KeyError: 'x'"),
    (TypeError("a\nb"), "unexpected TypeError: a"),
    (AssertionError(), "unexpected AssertionError"),
    (ValueError("bad shape."), "unexpected ValueError: bad shape"),
    (ModuleNotFoundError("No module named 'x'"), "unexpected ModuleNotFoundError: No module"),
    (RuntimeError("of torch"), "unexpected RuntimeError: of torch"),
    (torch.OutOfMemoryError("CUDA out of memory."), "unexpected OutOfMemoryError: CUDA out of"),
    (RecursionError("too deep"), "unexpected RecursionError: too deep"),
]
EXPECTED = [
    FloatingPointError("the loss is nan in epoch 1"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError("cannot write run/checkpoint.pt: No space left on device"),
    OtherProcessError(),
    ExportError("torch.export cannot trace the network"),
    EquivalenceError("the networks differ"),
]
FLAGS = [(["--debug", "fail"], {}), (["fail", "--debug"], {}), (["fail"], {"PYRO_SBP_DEBUG": "1"})]


@pytest.fixture
def fail(monkeypatch):
    monkeypatch.delenv("PYRO_SBP_DEBUG", raising=False)

    def invoke(error, args=("fail",), env=None):
        @click.group(cls=CommandGroup)
        def group():
            pass

        @group.command()
        @click.option("--number", type=int)
        def fail(number):
            raise error

        return CliRunner().invoke(group, args, env=env)

    return invoke


@pytest.mark.parametrize(("error", "words"), UNEXPECTED, ids=lambda value: repr(value)[:30])
def test_an_unexpected_failure_names_its_type_and_how_to_see_more(fail, error, words):
    result = fail(error)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {words}") and line.endswith(HINT)


@pytest.mark.parametrize("error", EXPECTED, ids=lambda error: type(error).__name__)
def test_an_expected_failure_is_its_message_alone(fail, error):
    result = fail(error)
    assert result.exit_code == 1 and result.stderr == f"Error: {error}\n"


def test_a_refused_request_is_its_message_alone(fail):
    result = fail(RequestError("seed is -1"))
    assert result.exit_code == 2 and result.stderr == "Error: seed is -1\n"


@pytest.mark.parametrize(("args", "env"), FLAGS, ids=["before", "after", "environment"])
@pytest.mark.parametrize(
    ("error", "status", "last"),
    [
        (KeyError("x"), 1, "Error: unexpected KeyError: 'x'"),
        (FloatingPointError("the loss is nan"), 1, "Error: the loss is nan"),
        (RequestError("seed is -1"), 2, "Error: seed is -1"),
    ],
    ids=["unexpected", "expected", "refused"],
)
def test_debug_prints_the_traceback_and_keeps_the_status(fail, error, status, last, args, env):
    result = fail(error, args, env)
    lines = result.stderr.splitlines()
    assert result.exit_code == status and result.stdout == ""
    assert lines[0] == "Traceback (most recent call last):"
    assert any("raise error" in line for line in lines) and __file__ in result.stderr
    assert lines[-1] == last


@pytest.mark.parametrize("value", ["0", ""])
def test_the_variable_can_be_off(fail, value):
    assert len(fail(KeyError("x"), env={"PYRO_SBP_DEBUG": value}).stderr.splitlines()) == 1


def test_a_wrong_option_has_no_traceback(fail):
    for args in (["--debug", "fail", "--number", "x"], ["fail", "--debug", "--nothing"]):
        result = fail(None, args)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [click.Abort(), click.exceptions.Exit(3)])
def test_click_s_own_exits_are_left_to_it(fail, error):
    result = fail(error)
    assert result.exit_code == getattr(error, "exit_code", 1)
    assert result.stderr == ("Aborted!\n" if isinstance(error, click.Abort) else "")


def test_of_several_processes_the_first_one_shows_what_all_found(fail):
    class DiskFailed(SingleProcessError, OSError):
        pass

    second = {OWN_GROUP: "1", "LOCAL_RANK": "1"}
    for error in (RequestError("seed is -1"), FloatingPointError("the loss is nan")):
        assert fail(error, env=second).stderr == ""
        assert fail(error, env=second | {"PYRO_SBP_DEBUG": "1"}).stderr == ""
    assert fail(DiskFailed("broken"), env=second).stderr == "Error: broken\n"
    line = f"Error: process 1: unexpected KeyError: 'x'{HINT}\n"
    assert fail(KeyError("x"), env=second).stderr == line


@pytest.mark.parametrize("args", [["--nonsense"], ["--debug"], ["--debug=2", "inspect"]])
def test_wrong_options_of_the_group_are_refused_in_one_line(args):
    result = run(*args)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1


def test_every_command_takes_the_flag(monkeypatch, tmp_path):
    from pyro_sbp.cli import cli

    for name in cli.commands:
        assert "--debug " in run(name, "--help").stdout
    monkeypatch.setattr("pyro_sbp.cli.inspect.find_run", lambda *args, **kwargs: {}["x"])
    assert run("inspect", tmp_path).stderr == f"Error: unexpected KeyError: 'x'{HINT}\n"
    assert run("inspect", tmp_path, "--debug").stderr.startswith("Traceback ")


def test_a_reader_that_stops_reading_is_no_failure():
    program = (
        "import sys, click\n"
        "from pyro_sbp.cli import cli\n"
        "@cli.command()\n"
        "def talk():\n"
        "    while True: click.echo('word')\n"
        "cli.main(['talk'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "word\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


def test_a_signal_while_the_commands_are_imported_stops_in_one_line():
    program = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'click':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting)\n"
        "from pyro_sbp.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "stopped\n")
