"""The cost of gating and cutting networks: `python -m pyro_sbp.experiments.gating_cost [NAME ...]`.

It measures `find_gates`, `shrink` and `checked_shrink`, each in a separate process. It prints
seconds, and the peak memory above that of the process with the network, as a multiple of the size
of the network. Memory is the resident memory that Linux reports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import shrink
from pyro_sbp.pruning.exactness import checked_shrink

__all__ = ["main"]

TASKS = ("find_gates", "shrink", "checked")


def _resident() -> int:
    """The resident memory of the process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _watched(function: Callable[[], object]) -> tuple[float, int]:
    """The duration of a call in seconds, and its peak memory in bytes above that at the start."""
    base, most, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, _resident() - base)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    return seconds, most


def _measure(name: str, size: int, task: str) -> dict[str, Any]:
    from torchvision.models import get_model

    torch.manual_seed(0)
    net: nn.Module = get_model(name).eval()
    x = torch.randn(2, 3, size, size)
    find_gates(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3))  # warm-up
    with torch.no_grad():
        net(x)
    own = sum(p.numel() * p.element_size() for p in net.parameters())
    if task == "find_gates":
        seconds, most = _watched(lambda: find_gates(net, x))
        return {"seconds": seconds, "times": most / own}
    gates = find_gates(net, x)
    theta = {g.name: torch.rand(g.size) * (torch.rand(g.size) > 1 / 3) for g in gates}
    cut: Any = shrink if task == "shrink" else checked_shrink
    seconds, most = _watched(lambda: cut(net, gates, theta, x))
    return {"seconds": seconds, "times": most / own}


def main(arguments: list[str] | None = None) -> None:
    """Print one line per network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "networks", nargs="*", default=["resnet50"], help="names of torchvision models"
    )
    parser.add_argument("--size", type=int, default=64, help="height and width of the two images")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.task:
        print(json.dumps(_measure(options.networks[0], options.size, options.task)))
        return
    print(f"two images of {options.size} x {options.size}: seconds, memory in network sizes\n")
    print(f"| network | {' | '.join(TASKS)} |\n|---|---|---|---|")
    for name in options.networks:
        cells = []
        for task in TASKS:
            command = [sys.executable, "-m", "pyro_sbp.experiments.gating_cost", name]
            command += ["--size", str(options.size), "--task", task]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            cells.append(f"{row['seconds']:.1f} s, {row['times']:.2f}x")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
