"""The tables and the figure of docs/pretrained_transformer.md, from the records of MiniLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pyro_sbp.errors import RequestError
from pyro_sbp.experiments import figure_files
from pyro_sbp.experiments.figure_files import describe, write_figure
from pyro_sbp.experiments.rows import markdown, unreadable
from pyro_sbp.reports.plots.style import REMOVED, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DIRECTORY", "FILES", "draw", "draw_units", "out_of_date", "results", "speed", "units"]

#: The records, one for each seed.
DIRECTORY = Path(__file__).parent / "results" / "minilm"
#: The files of the figure, and whether each is for a dark page.
FILES = {"docs/minilm-units.svg": False, "docs/minilm-units-dark.svg": True}
#: The methods, by the first word of the names of the networks.
TITLES = {"dense": "dense", "sbp": "SBP", "magnitude": "magnitude"}
RUNTIMES = {"eager": "PyTorch", "onnxruntime": "ONNX Runtime"}


def read(directory: Path = DIRECTORY) -> list[dict[str, Any]]:
    """The records, by seed.

    Raises:
        RequestError: there is no record, or one cannot be read.
    """
    found = []
    for path in directory.glob("seed-*.json"):
        try:
            entry = json.loads(path.read_text("utf-8"))
            found.append({**entry, "seed": int(entry["seed"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unreadable(path, "record of MiniLM", error) from error
    if not found:
        raise RequestError(f"there is no record in {directory}")
    return sorted(found, key=lambda entry: entry["seed"])


def _networks(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By the name of a network, its values for every seed that has it."""
    names = dict.fromkeys(name for entry in entries for name in entry["networks"])
    return {
        name: [
            {**entry["networks"][name], "dense": entry["networks"]["dense"]}
            for entry in entries
            if name in entry["networks"]
        ]
        for name in names
    }


def results() -> str:
    """The size and the accuracy of every network, as medians over the seeds, and the commands."""
    entries = read()
    rows = []
    for name, found in _networks(entries).items():
        accuracy = [100 - network["error"] for network in found]
        lost = [network["error"] - network["dense"]["error"] for network in found]
        spread = f" ({min(accuracy):.1f} to {max(accuracy):.1f})" if len(found) > 1 else ""
        before = [100 - n["pruned"]["error"] for n in found if "pruned" in n]
        rows.append(
            (
                TITLES[name.partition("-")[0]],
                f"{median([n['macs'] for n in found]) / 1e6:.0f} M",
                f"{median([n['dense']['macs'] / n['macs'] for n in found]):.2f}x",
                f"{median([n['encoder_parameters'] for n in found]) / 1e6:.1f} M",
                f"{median(before):.1f}" if before else "",
                f"{median(accuracy):.1f}{spread}",
                f"{-median(lost):+.1f}" if before else "",
                str(len(found)),
            )
        )
    head = (
        "network",
        "MACs",
        "fewer",
        "parameters of the encoder",
        "pruned, % right",
        "fine-tuned, % right",
        "points over dense",
        "seeds",
    )
    versions = entries[0]["versions"]
    used = ", ".join(f"{name} {number}" for name, number in versions.items())
    machines = "; ".join(dict.fromkeys(entry["machine"] for entry in entries))
    commands = "\n".join(f"- `{entry['command']}`" for entry in entries)
    return f"{markdown(head, rows)}\n\n{commands}\n\n{used}; {machines}"


def units() -> str:
    """The kept heads and MLP units of every network of the first seed, by layer."""
    entry = read()[0]
    rows = [
        (
            f"{TITLES[name.partition('-')[0]]}, "
            f"{entry['networks']['dense']['macs'] / network['macs']:.2f}x",
            "-".join(str(len(heads)) for heads in network["heads"]),
            "-".join(map(str, network["units"])),
        )
        for name, network in entry["networks"].items()
        if "heads" in network
    ]
    return markdown(("network", "heads of 12", "MLP units of 1,536"), rows)


def speed() -> str:
    """The measured speed-up of the networks of a record, and the command.

    Raises:
        RequestError: there is no file of measurements, or it cannot be read.
    """
    path = DIRECTORY / "speed.json"
    try:
        entry = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(path, "measurement of MiniLM", error) from error
    rows, settings = [], []
    for name, network in entry["networks"].items():
        latencies = network["latencies"]
        settings = [(each["runtime"], each["batch_size"]) for each in latencies]
        rows.append(
            (
                TITLES[name.partition("-")[0]],
                f"{network['macs_ratio']:.2f}x",
                *(
                    f"{each['dense_ms'] / each['pruned_ms']:.2f}x ({each['pruned_ms']:.1f} ms)"
                    for each in latencies
                ),
                f"{network['onnx_difference']:.0e}",
            )
        )
    head = (
        "network",
        "fewer MACs",
        *(f"{RUNTIMES[name]}, batch {size}" for name, size in settings),
    )
    used = ", ".join(f"{name} {number}" for name, number in entry["versions"].items())
    table = markdown((*head, "difference of ONNX"), rows)
    return f"{table}\n\n- `{entry['command']}`\n\n{used}; {entry['machine']}"


def _drawn(root: Path) -> dict[str, dict[str, Any]]:
    """By title, the networks by SBP of the first seed; none if a checkout has no record."""
    directory = root / "experiments" / "results" / "minilm"
    if not directory.exists():
        return {}
    networks = read(directory)[0]["networks"]
    return {
        f"{networks['dense']['macs'] / network['macs']:.1f}x": {
            key: network[key] for key in ("heads", "units")
        }
        for name, network in networks.items()
        if name.startswith("sbp")
    }


def _description(drawn: Mapping[str, Any]) -> str:
    return describe("heads and MLP units of MiniLM", drawn)


def out_of_date(root: Path) -> list[str]:
    """The files of the figure that are missing or were drawn from other numbers."""
    drawn = _drawn(root)
    return figure_files.out_of_date(root, FILES if drawn else (), _description(drawn))


def draw(root: Path, names: Sequence[str]) -> None:
    """Draw the named files of a checkout.

    Raises:
        RequestError: Matplotlib is not installed, or a file cannot be written.
    """
    drawn = _drawn(root)
    for name in names:
        figure = draw_units(drawn, 12, 1_536, dark=FILES[name])
        write_figure(root / name, figure, _description(drawn))


@drawing
def draw_units(networks: Mapping[str, Mapping[str, Any]], heads: int, width: int) -> Figure:
    """The heads that are kept, by layer and head, and the MLP units that are kept, by layer.

    Args:
        networks: by title, the remaining units of a network: ``heads``, a list of the kept heads of
            each layer, and ``units``, the number of kept MLP units of each layer.
        heads, width: the number of heads and MLP units of a layer of the dense network.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(2.2 * len(networks) + 0.6, 4.2), layout="constrained")
    axes = figure.subplots(2, len(networks), sharey="row", squeeze=False)
    for column, (title, network) in enumerate(networks.items()):
        grid, bars = axes[0, column], axes[1, column]
        layers = range(len(network["heads"]))
        for layer in layers:
            for head in range(heads):
                color = "C0" if head in network["heads"][layer] else REMOVED
                alpha = 1.0 if head in network["heads"][layer] else 0.25
                grid.add_patch(Rectangle((head, layer), 0.86, 0.86, color=color, alpha=alpha))
        grid.set(xlim=(0, heads), ylim=(len(layers), 0), title=title, xlabel="head")
        grid.set(yticks=[layer + 0.43 for layer in layers], yticklabels=[n + 1 for n in layers])
        grid.set(xticks=[])
        bars.barh(layers, [width] * len(layers), color=REMOVED, alpha=0.25)
        bars.barh(layers, network["units"], color="C0")
        bars.set(ylim=(len(layers) - 0.5, -0.5), xlabel="MLP units", xlim=(0, width))
        bars.set(yticks=list(layers), yticklabels=[n + 1 for n in layers])
        for axis in (grid, bars):
            for side in axis.spines.values():
                side.set_visible(False)
            axis.tick_params(left=False)
    axes[0, 0].set_ylabel("layer")
    axes[1, 0].set_ylabel("layer")
    return figure
