"""Pruning in several processes and on several machines agrees with pruning in one."""

import os
import shutil
import socket
import subprocess
import sys

import pyro
import pytest
import torch

from pyro_sbp.experiments.distributed import train

pytestmark = [
    pytest.mark.slow,
    # Short training removes no unit.
    pytest.mark.filterwarnings("ignore:no unit was removed:UserWarning"),
]

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
SCRIPT = ("-m", "pyro_sbp.experiments.distributed")


@pytest.fixture(scope="module")
def alone():
    with pyro.get_param_store().scope():
        return train().state


def agrees(file, state):
    found = torch.load(file, weights_only=True)
    assert found.pop("spread") == 0  # the processes have the same parameters, to the last bit
    assert found.pop("error") > 0
    assert found.keys() == state.keys()
    return max(float((found[name] - value).abs().max()) for name, value in state.items())


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def test_one_process_learns_something(alone):
    start = train(steps=0).state
    assert max(float((alone[name] - value).abs().max()) for name, value in start.items()) > 0.1


@pytest.fixture(scope="module")
def errors():
    with pyro.get_param_store().scope():
        return [train(steps=1_000, seed=seed).error for seed in range(3)]


@pytest.mark.parametrize("own_noise", [False, True])
def test_the_error_of_two_processes_is_within_the_range_of_seeds(errors, own_noise, tmp_path):
    more = ["--own-noise"] if own_noise else []
    options = ["--nproc-per-node", "2", "--master-port", free_port()]
    output = ["--steps", "1000", "--output", str(tmp_path / "state.pt"), *more]
    command = [*TORCHRUN, *options, *SCRIPT, *output]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    error = float(torch.load(tmp_path / "state.pt", weights_only=True)["error"])
    spread = max(errors) - min(errors)
    assert min(errors) - spread <= error <= max(errors) + spread


@pytest.mark.parametrize("own_noise", [False, True])
def test_two_processes_agree_with_one(alone, own_noise, tmp_path):
    more = ["--own-noise"] if own_noise else []
    options = ["--nproc-per-node", "2", "--master-port", free_port()]
    command = [*TORCHRUN, *options, *SCRIPT, "--output", str(tmp_path / "state.pt"), *more]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    difference = agrees(tmp_path / "state.pt", alone)
    assert difference > 1e-3 if own_noise else difference <= 1e-9


@pytest.fixture
def machines():
    """Two network namespaces with an address each, joined by a cable."""
    if shutil.which("ip") is None:
        pytest.skip("there is no command ip; it is in Debian's package iproute2")
    names, ends = ([f"{word}{os.getpid()}{i}" for i in (1, 2)] for word in ("sbp", "v"))
    addresses = ["10.213.7.1", "10.213.7.2"]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", ends[0], "netns", names[0], "type", "veth",
               "peer", "name", ends[1], "netns", names[1])  # fmt: skip
            for name, end, address in zip(names, ends, addresses, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made: {error.stderr.strip()}")
        yield list(zip(names, ends, addresses, strict=True))
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def test_two_machines_agree_with_one_process(alone, machines, tmp_path):
    master = machines[0][2]
    started = []
    for rank, (name, end, _) in enumerate(machines):
        command = [
            "ip", "netns", "exec", name, *TORCHRUN, "--nnodes", "2", "--node-rank", str(rank),
            "--nproc-per-node", "1", "--master-addr", master, "--master-port", "29511",
            *SCRIPT, "--output", str(tmp_path / "state.pt"),
        ]  # fmt: skip
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": end}
        started.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    try:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    assert agrees(tmp_path / "state.pt", alone) <= 1e-9
