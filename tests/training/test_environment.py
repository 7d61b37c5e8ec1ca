"""The facts for a bug report: complete, anonymous, and there whatever is broken."""

import builtins
import dataclasses
import subprocess
from pathlib import Path

import pytest
import torch

from pyro_sbp import machine
from pyro_sbp.errors import RequestError
from pyro_sbp.training import environment
from pyro_sbp.training.environment import Environment, read_environment
from pyro_sbp.training.threads import Cores


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Other tests import the packages of extras and measure the cores."""
    monkeypatch.setattr(environment, "find_extras", dict)
    monkeypatch.setattr(environment, "measure_cores", lambda: Cores(2, 0.5))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)


def test_the_facts_are_those_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("KMP_BLOCKTIME", "0")
    found = read_environment(tmp_path, ["digits"])
    assert found.problems == [] and found.datasets["digits"].state == "present"
    assert found.threads.torch == torch.get_num_threads() and found.threads.chosen == 1
    assert found.threads.source == "OMP_NUM_THREADS"
    assert found.threads.variables == {"OMP_NUM_THREADS": "1", "KMP_BLOCKTIME": "0"}
    assert found.load.usable_cores == 2 and found.load.busy_cores == 0.5
    assert found.devices.cpu and len(found.devices.cuda) == torch.cuda.device_count()
    memory = found.memory
    assert memory.usable > 0 and (memory.total is None or memory.available <= memory.total)
    assert found.disk > 0 and found.versions["torch"] is not None


def test_the_keys_are_stable(tmp_path):
    found = read_environment(tmp_path).to_dict()
    assert list(found) == [field.name for field in dataclasses.fields(Environment)]
    assert list(found) == [
        *("versions", "platform", "devices", "threads", "load", "memory", "disk", "extras"),
        *("data_dir", "datasets", "problems"),
    ]
    assert list(found["devices"]) == ["cpu", "cpus", "cuda", "cuda_version", "driver"]
    assert list(found["threads"]) == ["torch", "chosen", "source", "variables"]
    assert list(found["load"]) == ["averages", "usable_cores", "busy_cores"]
    assert list(found["memory"]) == ["total", "available", "usable"]
    assert all(list(status) == ["state", "detail"] for status in found["datasets"].values())


def test_a_torch_that_cannot_be_imported_is_a_problem(tmp_path, monkeypatch):
    import_module = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "torch":
            raise OSError(f"{Path.home()}/lib/libtorch.so: undefined symbol: x\nmore")
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    found = read_environment(tmp_path).to_dict()
    line = "torch: cannot be imported: OSError: ~/lib/libtorch.so: undefined symbol: x"
    assert found["problems"] == [line]
    assert found["threads"]["torch"] is None and found["memory"]["usable"] is None
    assert found["devices"]["cpu"] and found["devices"]["cuda"] == []


@pytest.fixture
def cuda(monkeypatch):
    properties = type("Properties", (), {"name": "NVIDIA H100", "major": 9, "minor": 0})
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_cuda_devices(tmp_path, monkeypatch, cuda):
    def smi(command, **options):
        return subprocess.CompletedProcess(command, 0, "560.35.03\n560.35.03\n", "")

    monkeypatch.setattr(environment.subprocess, "run", smi)
    devices = read_environment(tmp_path).to_dict()["devices"]
    assert devices["cuda"] == [
        {
            "name": "NVIDIA H100",
            "memory": 80 * 2**30,
            "free_memory": 70 * 2**30,
            "capability": "9.0",
        }
    ]
    assert devices["cuda_version"] == "12.8" and devices["driver"] == "560.35.03"


@pytest.mark.parametrize(
    "failure", [subprocess.TimeoutExpired("nvidia-smi", 10), PermissionError("no"), None]
)
def test_a_broken_driver_is_reported(tmp_path, monkeypatch, cuda, failure):
    def smi(command, **options):
        if failure is not None:
            raise failure
        return subprocess.CompletedProcess(command, 9, "NVIDIA-SMI has failed\n", "")

    def refuse(index):
        raise RuntimeError("CUDA driver version is insufficient\nCompile with ...")

    monkeypatch.setattr(environment.subprocess, "run", smi)
    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    found = read_environment(tmp_path)
    assert found.devices.driver is None and found.devices.cuda == []
    assert found.problems == ["CUDA: CUDA driver version is insufficient"]


def test_neither_the_user_nor_the_home_is_named(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("LOGNAME", "alice")
    anonymous = environment._anonymous
    assert anonymous({"folder:/home/alice/a": ["/home/alice", 3, None]}) == {
        "folder:~/a": ["~", 3, None]
    }
    assert (
        anonymous("/scratch/alice/data and /scratch/alice")
        == "/scratch/USER/data and /scratch/USER"
    )
    assert anonymous("/home/alicent/malice/x") == "/home/alicent/malice/x"
    assert anonymous("alice's /alice-data") == "alice's /alice-data"
    assert anonymous("(/home/alice/x: no)") == "(~/x: no)"


@pytest.mark.parametrize("home", ["/", ""])
def test_a_user_without_a_home_or_a_name(monkeypatch, home):
    def refuse():
        raise KeyError("uid not found")

    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(environment.getpass, "getuser", refuse)
    if home == "":
        monkeypatch.setattr(environment.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError()))
    assert environment._anonymous("/data/x") == "/data/x"


def test_a_system_that_tells_little(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("not here")

    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(environment.os, "getloadavg", refuse)
    monkeypatch.setattr(environment.shutil, "disk_usage", refuse)
    found = read_environment(tmp_path)
    assert found.load.averages == [] and found.disk is None
    assert found.memory.total is None and found.memory.available is None
    assert found.problems == []


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(RequestError, match="unknown data set 'minst'"):
        read_environment(tmp_path, ["minst"])
