"""The tables of docs/budgets.md, from the records of `pyro_sbp.experiments.budgets`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.budgets import DIRECTORY
from pyro_sbp.experiments.rows import markdown, title, unreadable

__all__ = ["commands", "costs", "error_budgets", "int8", "layers", "speedups", "variants"]

_RUNTIMES = {"eager": "eager", "onnxruntime": "ONNX Runtime", "int8": "ONNX Runtime, int8"}

Rows = list[tuple[str, ...]]


def _cells(part: str, rows_of: Callable[[Mapping[str, Any]], Rows]) -> Rows:
    """The rows of a table from all records that have a part.

    Raises:
        RequestError: no record has the part, or a record cannot be read.
    """
    cells: Rows = []
    for path in sorted(DIRECTORY.glob("*.json")):
        try:
            entry = json.loads(path.read_text("utf-8"))
            if part in entry:
                cells += rows_of(entry)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unreadable(path, "record of budgets", error) from error
    if not cells:
        raise RequestError(f"no record in {DIRECTORY} has the part {part!r}")
    return cells


def _name(entry: Mapping[str, Any]) -> str:
    """The network, the data and the name of the run of a record."""
    return f"{title(entry['arch'], entry['dataset'])}, `{entry['run']}`"


def _speedup(latency: Mapping[str, Any]) -> str:
    """A speed-up and its confidence interval."""
    low, high = latency["speedup_low"], latency["speedup_high"]
    return f"{latency['speedup']:.2f}x ({low:.2f} to {high:.2f})"


def _change(errors: Mapping[str, Any]) -> str:
    """The error of the dense and of the pruned network."""
    return f"{errors['dense']:.2f} to {errors['pruned']:.2f}"


def _first(entry: Mapping[str, Any], rows: Rows) -> Rows:
    """Rows that begin with the name of the network, which only the first one shows."""
    return [(_name(entry) if not index else "", *row) for index, row in enumerate(rows)]


def speedups() -> str:
    """The targets of `--speedup`, and the speed-ups measured by the search and in a new process."""

    def rows(entry: Mapping[str, Any]) -> Rows:
        found: Rows = []
        for row in entry["budgets"]:
            if row["budget"] != "speedup":
                continue
            asked = (f"{row['target']:g}x", str(row["batch_size"]))
            if "refusal" in row:
                largest = re.search(r"the network is (\S+) times faster", row["refusal"])
                most = largest[1] if largest else "?"
                found.append((*asked, f"refused: {most}x is the largest", "-", "-", "-", "-"))
                continue
            units = "-".join(map(str, row["units"].values()))
            sizes = (f"{row['macs_ratio']:.2f}x", units, _change(row["error"]))
            found.append((*asked, _speedup(row["found"]), _speedup(row["later"]), *sizes))
        return _first(entry, found)

    head = ("network", "asked", "batch", "measured by `prune`", "in a new process")
    return markdown((*head, "MACs", "units", "test error, %"), _cells("budgets", rows))


def error_budgets() -> str:
    """The networks of `--max-error-increase`: their errors, sizes and speed-ups."""

    def rows(entry: Mapping[str, Any]) -> Rows:
        found: Rows = []
        for row in entry["budgets"]:
            if row["budget"] != "max_error_increase":
                continue
            asked = f"{row['target']:g}"
            if "refusal" in row:
                found.append((asked, f"refused: {row['refusal']}", *["-"] * 5))
                continue
            held_out, test = _change(row["validation_error"]), _change(row["error"])
            units = "-".join(map(str, row["units"].values()))
            speed = [f"{x['speedup']:.2f}x" for x in row["later"]]
            found.append((asked, held_out, test, f"{row['macs_ratio']:.2f}x", units, *speed))
        return _first(entry, found)

    cells = _cells("budgets", rows)
    head = ("network", "points", "held-out error, %", "test error, %", "MACs", "units")
    return markdown((*head, "speed-up, batch 1", "batch 128"), cells)


def costs() -> str:
    """Runs with MACs and with latency as the cost of a unit: errors, MACs ratio, speed-ups, and the
    speed-up of the network with one unit per gate, which is the largest that is possible."""

    def rows(entry: Mapping[str, Any]) -> Rows:
        error = entry["error"]
        last = error["pruned"] if error["finetuned"] is None else error["finetuned"]
        units = "-".join(map(str, entry["units"].values()))
        found: Rows = []
        for latency in entry["network"]["latencies"]:
            largest = latency["dense_ms"] / latency["floor_ms"]
            share = latency["speedup"] / entry["macs_ratio"]
            speed = (_speedup(latency), f"{share:.2f}", f"{largest:.2f}x")
            found.append((_RUNTIMES[latency["runtime"]], str(latency["batch_size"]), *speed))
        of_run = (f"{error['dense']:.2f} to {last:.2f}", units, f"{entry['macs_ratio']:.2f}x")
        blank = ("",) * len(of_run)
        return _first(
            entry, [(*(blank if place else of_run), *row) for place, row in enumerate(found)]
        )

    head = ("network", "test error, %", "units", "MACs", "runtime", "batch", "speed-up")
    return markdown((*head, "of the MACs ratio", "one unit per gate"), _cells("network", rows))


def layers(run: str, batch: str = "128") -> str:
    """The MACs and the time of every layer of a run, dense and pruned, at a batch size.

    Raises:
        RequestError: there is no record of this run.
    """

    def rows(entry: Mapping[str, Any]) -> Rows:
        if entry["run"] != run:
            return []
        profile = entry["network"]["profile"]
        dense, pruned = (profile[name][f"batch-{batch}"] for name in ("dense", "pruned"))
        found = []
        for layer, before in dense.items():
            after = pruned.get(layer)
            macs = [
                sum(profile[name]["macs"].values())
                if layer == "whole"
                else profile[name]["macs"].get(layer, 0)
                for name in ("dense", "pruned")
            ]
            fewer = f"{macs[0] / macs[1]:.1f}x" if macs[1] else "-"
            times = ["-", "-"] if after is None else [f"{after:.3f}", f"{before / after:.2f}x"]
            found.append((layer, fewer, f"{before:.3f}", *times))
        return found

    head = ("layer", "MACs", "dense, ms", "pruned, ms", "faster")
    return markdown(head, _cells("network", rows))


def variants() -> str:
    """The latencies of pruned networks in other forms: rounded, channels last, compiled."""
    names = {"channels-last": "channels last", "compiled": "`torch.compile`"}

    def rows(entry: Mapping[str, Any]) -> Rows:
        forms: dict[str, Any] = dict(entry["variants"])
        if "network" in entry:
            eager = [x for x in entry["network"]["latencies"] if x["runtime"] == "eager"]
            forms = {"eager": {"latencies": eager}} | forms
        if "compiled" in entry:
            forms["compiled"] = {"latencies": entry["compiled"]}
        found: Rows = []
        for form, of_form in forms.items():
            name = names.get(form, form)
            if form == "round-to-auto":
                name = f"`--round-to auto` (multiples of {of_form['multiple']})"
            times = [
                f"{x['dense_ms']:.3f} to {x['pruned_ms']:.3f}, {x['speedup']:.2f}x"
                for x in of_form["latencies"]
            ]
            found.append((name, *times))
        return _first(entry, found)

    head = ("network", "form", "ms, batch 1", "ms, batch 128")
    return markdown(head, _cells("variants", rows))


def int8() -> str:
    """Dense, pruned and pruned int8 networks: error, file, and milliseconds per call."""

    def rows(entry: Mapping[str, Any]) -> Rows:
        by_runtime: dict[str, dict[int, Any]] = {}
        for row in entry["int8"]:
            by_runtime.setdefault(row["runtime"], {})[row["batch_size"]] = row
        row = entry["int8"][0]
        networks = {
            "dense": (f"{entry['error']['dense']:.2f}", row["dense_file_bytes"]),
            "pruned": (f"{row['pruned_error']:.2f}", row["pruned_file_bytes"]),
        }
        found: Rows = []
        for name, (error, size) in networks.items():
            for runtime in ("eager", "onnxruntime"):
                times = [f"{x[f'{name}_ms']:.3f}" for x in by_runtime[runtime].values()]
                what = f"{name}, {_RUNTIMES[runtime]}"
                found.append((what, error, f"{size / 1e3:,.1f}", *times))
        times = [f"{x['pruned_ms']:.3f}" for x in by_runtime["int8"].values()]
        size = f"{row['int8_file_bytes'] / 1e3:,.1f}"
        found.append((f"pruned, {_RUNTIMES['int8']}", f"{row['int8_error']:.2f}", size, *times))
        return _first(entry, found)

    head = ("network", "form", "test error, %", "file, kB", "ms, batch 1", "ms, batch 128")
    return markdown(head, _cells("int8", rows))


def commands() -> str:
    """The commands, versions and machines of the records of budgets, as a list."""

    def rows(entry: Mapping[str, Any]) -> Rows:
        used = ", ".join(f"{name} {number}" for name, number in entry["versions"].items())
        return [(entry["run"], entry["command"], used, entry["machine"])]

    return "\n".join(
        f"- `{run}`: `{words}`; {used}; {where}"
        for run, words, used, where in _cells("command", rows)
    )
