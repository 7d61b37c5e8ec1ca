"""Gate the classifiers of torchvision, cut them with random masks, and compare the outputs.

`python -m pyro_sbp.experiments.torchvision_survey [NAME ...]` prints a table with one line per
network. With `--against torch-pruning`, Torch-Pruning cuts the networks with the same masks
instead. Each network runs in a separate process with a time limit, on small images and with random
weights. Weights that are initialized to zero (heads, layer scales) get ordinary random values.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.errors import first_line
from pyro_sbp.gates.attention import has_attention, separate_attention
from pyro_sbp.gates.folding import GatedNetwork, call
from pyro_sbp.gates.probing import Gates, find_gates
from pyro_sbp.gates.proving import enliven
from pyro_sbp.gates.surgery import relative_difference, shrink_in_place, surviving_units
from pyro_sbp.pruning.macs import count_macs

__all__ = ["main", "survey"]

#: Image sizes of families that do not accept 64 x 64.
SIZES = {"inception": 299, "maxvit": 224}
#: Short texts in the table for the reasons why layers are not prunable.
REASONS = {
    "several": "its units are mixed",
    "output of the network": "is an output",
    "cutting it": "cannot be cut exactly",
    "is not called": "is not called",
    "no layer reads": "is read by no layer",
    "which is not prunable": "has or meets units of these",
    "meets no units": "meets no units",
    "no part of its own": "meets units as a whole",
}


def _build(name: str) -> tuple[str, nn.Module, Tensor]:
    from torchvision.models import get_model_builder

    builder = get_model_builder(name)
    family = builder.__module__.rpartition(".")[2]
    size = SIZES.get(family, 64)
    options: dict[str, Any] = {}
    if family == "vision_transformer":
        size = options["image_size"] = 4 * int(name.rpartition("_")[2])  # 4 x 4 patches
    if family == "maxvit":
        options["input_size"] = (size, size)
    if family in ("inception", "googlenet"):
        options["init_weights"] = False
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = builder(num_classes=10, **options).double().eval().requires_grad_(False)
    enliven(net, generator)
    if has_attention(net):
        net = separate_attention(net)  # for both libraries, so that both cut the same network
    return family, net, torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)


def _masks(gates: Gates) -> dict[str, Tensor]:
    """Random theta, which is zero for about a third of the units."""
    generator = torch.Generator().manual_seed(1)
    theta = {}
    for gate in gates:
        kept = torch.rand(gate.size, generator=generator) > 1 / 3
        theta[gate.name] = (0.5 + torch.rand(gate.size, generator=generator).double()) * kept
    return theta


def _masked(net: nn.Module, gates: Gates, theta: dict[str, Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return GatedNetwork(net, gates)(x, {name: value[None] for name, value in theta.items()})


def survey(name: str) -> dict[str, Any]:
    """Gate and cut one network, and return its row of the table."""
    family, net, x = _build(name)
    start = time.perf_counter()
    gates = find_gates(net, x)
    seconds = time.perf_counter() - start
    theta = _masks(gates)
    dense, expected = count_macs(net, x[:1]), _masked(net, gates, theta, x)
    units = surviving_units(gates, theta)
    shrink_in_place(net, gates, theta, units)
    reasons = Counter(
        next((words for key, words in REASONS.items() if key in reason), reason)
        for reason in gates.not_prunable.values()
    )
    with torch.no_grad():
        difference = relative_difference(expected, call(net, x))
    return {
        "network": name,
        "family": family,
        "gates": len(gates),
        "units": sum(gate.size for gate in gates),
        "zeroed": sum(int(unit.zeroed.sum()) for unit in units.values()),
        "macs": dense,
        "macs_left": count_macs(net, x[:1]) / dense,
        "max_rel_diff": difference,
        "seconds": round(seconds, 1),
        "left_alone": dict(reasons),
    }


def torch_pruning(name: str) -> dict[str, Any]:
    """Cut one network with Torch-Pruning and the same masks, and return its row of the table."""
    import torch_pruning as tp

    family, net, x = _build(name)
    gates = find_gates(net, x)
    theta = {name: (value != 0).double() for name, value in _masks(gates).items()}
    expected = _masked(net, gates, theta, x)
    net = net.requires_grad_(True)
    start = time.perf_counter()
    graph = tp.DependencyGraph().build_dependency(net, example_inputs=x)
    for gate in gates:
        span = gate.writers[0]
        layer = net.get_submodule(span.layer)
        gone = torch.nonzero(theta[gate.name][span.units] == 0).flatten().tolist()
        linear = isinstance(layer, nn.Linear)
        cut = tp.prune_linear_out_channels if linear else tp.prune_conv_out_channels
        graph.get_pruning_group(layer, cut, idxs=gone).prune()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        difference = relative_difference(expected, call(net.eval(), x))
    found = {"network": name, "family": family, "seconds": round(seconds, 1)}
    return {**found, "max_rel_diff": difference}


def _in_a_process(name: str, against: str | None, limit: float) -> dict[str, Any]:
    module = "pyro_sbp.experiments.torchvision_survey"
    command = [sys.executable, "-m", module, "--one", name]
    command += ["--against", against] if against else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"network": name, "failed": f"not finished after {limit:g} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"network": name, "failed": lines[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['network']} | {row['failed']} |"
    if "gates" not in row:
        return f"| {row['network']} | {row['max_rel_diff']:.0e} | {row['seconds']} |"
    left = ", ".join(f"{count} {reason}" for reason, count in row["left_alone"].items())
    return (
        f"| {row['network']} | {row['gates']} | {row['units']:,} | {row['zeroed']:,} "
        f"| {row['macs'] / 1e6:,.0f} | {row['macs_left']:.0%} | {row['max_rel_diff']:.0e} "
        f"| {row['seconds']} | {left} |"
    )


def by_family(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A table with one line per family, from rows of `survey`."""
    yield "| family | networks | gates | MACs left | largest difference | layers not prunable |"
    yield "|---|---|---|---|---|---|"
    for family in sorted({row["family"] for row in rows if "family" in row}):
        own = [row for row in rows if row.get("family") == family]
        left: Counter[str] = Counter()
        for row in own:
            left.update(row["left_alone"])
        most = max(row["max_rel_diff"] for row in own)
        reasons = ", ".join(f"{count} {reason}" for reason, count in left.items())
        gates, macs = (
            f"{min(values):{spec}} to {max(values):{spec}}"
            if min(values) < max(values)
            else f"{values[0]:{spec}}"
            for values, spec in (
                ([row["gates"] for row in own], ""),
                ([row["macs_left"] for row in own], ".0%"),
            )
        )
        yield f"| {family} | {len(own)} | {gates} | {macs} | {most:.0e} | {reasons} |"
    for row in rows:
        if "failed" in row:
            yield f"| {row['network']} | | | | | {row['failed']} |"


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and optionally write one line of JSON per network to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*", help="of torchvision; all if none is named")
    parser.add_argument("--against", choices=("torch-pruning",))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a network")
    parser.add_argument("--json", help="a file to add the rows to, as JSON lines")
    parser.add_argument("--families", help="print such a file by family, and do nothing else")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.families:
        with open(options.families, encoding="utf-8") as file:
            print("\n".join(by_family([json.loads(line) for line in file])))
        return
    if options.one:
        function = torch_pruning if options.against else survey
        try:
            row = function(options.networks[0])
        except Exception as error:  # Torch-Pruning may raise anything
            row = {"network": options.networks[0], "failed": first_line(error)[:200]}
        print(json.dumps(row))
        return
    import torchvision

    names = options.networks or torchvision.models.list_models(module=torchvision.models)
    if not options.against:
        print(
            "| network | gates | units | zeroed | MACs, millions | left | largest difference "
            "| seconds | layers not prunable |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
    else:
        print("| network | largest difference | seconds |\n|---|---|---|")
    for name in names:
        row = _in_a_process(name, options.against, options.limit)
        print(_line(row), flush=True)
        if options.json:
            with open(options.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
