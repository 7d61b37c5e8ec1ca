"""Which variables of the environment put this process into a group, and which are stray."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from pyro_sbp.cli import cli
from pyro_sbp.errors import RequestError
from pyro_sbp.training import processes
from pyro_sbp.training.devices import launch

STRAYS = [
    {"RANK": "1"},
    {"LOCAL_RANK": "1"},
    {"RANK": "0", "LOCAL_RANK": "3"},
    {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "elsewhere"},
    {"RANK": "abc"},
    {"RANK": ""},
    {"LOCAL_RANK": "1.5", "WORLD_SIZE": "many"},
    {"LOCAL_RANK": "²"},
    {"PYRO_SBP_OWN_GROUP": "1"},
    {"PYRO_SBP_OWN_GROUP": "1", "LOCAL_RANK": "abc"},
    {"PYRO_SBP_OWN_GROUP": "1", "RANK": "1"},
]
ELASTIC = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
}


@pytest.fixture(autouse=True)
def no_group(monkeypatch):
    for name in (*processes.VARIABLES, processes.OWN_GROUP, processes.TORCHRUN):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def environment(monkeypatch):
    def change(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize("strays", STRAYS, ids=str)
def test_a_stray_variable_puts_the_process_into_no_group(strays, environment):
    environment(strays)
    assert processes.is_first() and processes.rank() == 0
    assert processes.num_processes() is None


@pytest.mark.parametrize("strays", STRAYS, ids=str)
def test_stray_variables_are_removed(strays, environment):
    environment(strays)
    found = processes.forget_stray_variables()
    assert not set(processes.VARIABLES) & set(os.environ)
    assert found == {name: strays[name] for name in processes.VARIABLES if name in strays}


def test_a_launch_on_one_device_leaves_the_environment_as_it_was(environment):
    environment({"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "elsewhere", "WORLD_SIZE": "4"})
    before = dict(os.environ)
    fabric = launch("cpu")
    assert fabric.world_size == 1 and fabric.global_rank == 0
    assert dict(os.environ) == before


def test_torchrun_s_variables_are_read_and_kept(environment):
    environment(ELASTIC)
    processes.forget_stray_variables()
    assert processes.rank() == 1 and not processes.is_first()
    assert processes.num_processes() == 4 and processes.processes_here() == 2
    environment({"RANK": "0"})
    assert processes.is_first()


@pytest.mark.parametrize("value", ["", "abc", "-1", "1.0", "²"])
@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_damaged_variables_of_torchrun_are_refused_and_the_refusal_is_seen(
    name, value, environment
):
    environment({**ELASTIC, "RANK": "0", name: value})
    with pytest.raises(RequestError, match=f"{name} is '{value}'; expected an integer >= "):
        processes.num_processes()
    assert processes.is_first()


def test_only_processes_started_inside_join_the_group():
    program = "from pyro_sbp.training.processes import is_first, rank; print(is_first(), rank())"

    def child():
        environment = {**os.environ, "LOCAL_RANK": "1"}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout

    with processes.starting_copies():
        assert processes.is_first()
        assert child() == "False 1\n"
    assert child() == "True 0\n"
    assert processes.OWN_GROUP not in os.environ


def test_a_copy_stays_one_when_it_starts_the_group_itself(environment):
    environment({processes.OWN_GROUP: "1", "LOCAL_RANK": "1"})
    with processes.starting_copies():
        assert not processes.is_first()
    processes.forget_stray_variables()
    assert not processes.is_first()


@pytest.mark.parametrize("strays", STRAYS, ids=str)
def test_the_command_line_speaks_in_spite_of_stray_variables(strays, environment):
    environment(strays)
    result = CliRunner().invoke(cli, ["train", "--arch", "lenet6"])
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "Error: unknown arch 'lenet6'; did you mean 'lenet5'? expected "
    )
