"""pyro-sbp doctor."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import run

from pyro_sbp.cli.doctor import _lines

#: Without a network: opening any socket is an error.
PROGRAM = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("the network was used")

socket.getaddrinfo = socket.create_connection = refuse
sys.argv = ["pyro-sbp", *sys.argv[1:]]
{more}
from pyro_sbp.cli import main
main()
"""
#: Only one extra, because importing the packages of all extras takes long.
ONE_EXTRA = """
from types import SimpleNamespace
from pyro_sbp.training import packages
packages.metadata.metadata = lambda name: SimpleNamespace(get_all=lambda key: ["report"])
"""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(ONE_EXTRA, id="one extra"),
        pytest.param("", id="all extras", marks=pytest.mark.slow),
    ],
)
def found(request, tmp_path_factory):
    """What it finds on a machine with a broken optional package, and no data."""
    root = tmp_path_factory.mktemp("doctor")
    (root / "matplotlib.py").write_text("print('words'); raise ImportError('libx.so is missing')")
    (root / "images" / "train" / "a").mkdir(parents=True)
    names = ("mnist", "cifar100", "digits", "folder:images")
    options = [word for name in names for word in ("--dataset", name)]
    program = PROGRAM.format(more=request.param)
    command = [sys.executable, "-W", "ignore", "-c", program, "doctor", "--json", *options]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


def test_json_is_one_object_whatever_is_broken_or_missing(found):
    assert found["data_dir"] == "data" and found["problems"] == []
    assert found["datasets"]["mnist"] == {"state": "missing", "detail": None}
    assert found["datasets"]["folder:images"]["state"] == "damaged"
    report = found["extras"]["report"]
    assert not report["installed"]
    assert report["packages"]["matplotlib"]["version"]
    problem = "cannot be imported: ImportError: libx.so is missing"
    assert report["packages"]["matplotlib"]["problem"] == problem


def test_the_text_has_the_same_facts(found, monkeypatch):
    facts = SimpleNamespace(to_dict=lambda: found)
    monkeypatch.setattr("pyro_sbp.training.environment.read_environment", lambda *args: facts)
    text = run("doctor").stdout
    for title in ("versions", "machine", "extras", "data sets in data", "no problems"):
        assert f"\n{title}\n" in f"\n{text}"
    assert "(cannot be imported: ImportError: libx.so is missing)" in text
    for name in ("mnist", "cifar100"):
        assert any(line.split() == [name, "missing"] for line in text.splitlines())
    assert "  digits         present: part of scikit-learn\n" in text


def test_an_unknown_data_set_is_refused():
    result = run("doctor", "--dataset", "minst")
    assert result.exit_code == 2 and "did you mean 'mnist'?" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_is_unknown_is_said_in_words():
    found = {
        "versions": {"python": "3.11.7", "torch": None},
        "platform": "Linux",
        "devices": {
            "cpu": "AMD EPYC",
            "cpus": 4,
            "cuda": [
                {
                    "name": "NVIDIA H100",
                    "memory": 80 * 2**30,
                    "free_memory": 2**30,
                    "capability": "9.0",
                }
            ],
            "cuda_version": "12.8",
            "driver": "560.35.03",
        },
        "threads": {"torch": None, "chosen": 1, "source": "free cores", "variables": {"A": "1"}},
        "load": {"averages": [], "usable_cores": 1.5, "busy_cores": 0.25},
        "memory": {"total": 2**31, "available": None, "usable": None},
        "disk": None,
        "extras": {
            "export": {
                "installed": False,
                "packages": {"onnx": {"version": None, "problem": "not installed"}},
            }
        },
        "data_dir": "data",
        "datasets": {},
        "problems": ["torch: not installed"],
    }
    assert _lines(found) == [
        "versions",
        "  python  3.11.7",
        "  torch   not installed",
        "",
        "machine",
        "  platform  Linux",
        "  cpu       AMD EPYC, 4 CPUs",
        "  cuda      NVIDIA H100, compute capability 9.0, 80.0 GiB, 1.0 GiB free; "
        "torch for CUDA 12.8; driver 560.35.03",
        "  threads   torch cannot be imported; pyro-sbp 1 (from free cores); A=1",
        "  load      others use 0.2 of 1.5 cores; load averages unknown",
        "  memory    2.0 GiB, unknown available, unknown within the container's limit",
        "  disk      unknown free in the current directory",
        "",
        "extras",
        "  export  not installed: onnx (not installed)",
        "",
        "data sets in data",
        "",
        "problems",
        "  torch: not installed",
    ]
