"""Measure the CPU seconds of `find_gates` with one thread, also those of another version.

python -m pyro_sbp.experiments.survey.timing COLLECTION NAME ... [--code DIRECTORY]
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import import_module

import torch

from pyro_sbp.experiments.survey.collections import COLLECTIONS, collection
from pyro_sbp.gates.proving import enliven

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m pyro_sbp.experiments.survey.timing", description=__doc__.split("\n")[0]
    )
    parser.add_argument("collection", choices=COLLECTIONS)
    parser.add_argument("networks", nargs="+", help="names")
    parser.add_argument("--code", help="the directory of another version of the package")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    surveyed = {name: collection(options.collection).build(name) for name in options.networks}
    for network in surveyed.values():
        network.net.double().eval().requires_grad_(False)
        enliven(network.net, torch.Generator().manual_seed(0))
    if options.code:
        for module in [name for name in sys.modules if name.partition(".")[0] == "pyro_sbp"]:
            del sys.modules[module]
        sys.path.insert(0, options.code)
    find_gates = import_module("pyro_sbp").find_gates
    for name, network in surveyed.items():
        start = time.process_time()
        gates = find_gates(network.net, network.x.double(), ignore=network.ignore)
        seconds = time.process_time() - start
        units = sum(gate.size for gate in gates)
        print(f"{name}: {seconds:.2f} s, {len(gates)} gates of {units:,} units", flush=True)


if __name__ == "__main__":
    main()
