"""pyro-sbp inspect: what the posterior of a run says about every unit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pyro_sbp.cli.common import find_run, table
from pyro_sbp.training.runs import Run

__all__ = ["inspect"]


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def inspect(run: Path | None, as_json: bool) -> None:
    """Show what the posterior says about the units of every gate, or the weights of every layer.

    RUN is a run directory, finished or stopped with noise; the newest run if it is left out. It
    needs neither the data nor the code of the network.
    """
    found = Run.read(find_run(run, finished=False))

    from pyro_sbp.reports.posterior import describe, read_posterior

    description = describe(found, read_posterior(found.directory))
    if as_json:
        click.echo(json.dumps({"run": str(found.directory), **description}, indent=2))
    else:
        click.echo(f"{found.directory}: {state(description)}\n")
        click.echo(_text(description))


def state(description: dict[str, Any]) -> str:
    """How far the run is that a posterior is of, in words."""
    epochs = f"{description['epoch']} of {description['epochs']} epochs with noise"
    if description["finished"]:
        return f"finished, {epochs}"
    return f"not finished, stands at {epochs}; kept is what reaches the threshold now"


def _text(description: dict[str, Any]) -> str:
    from pyro_sbp.reports.posterior import gate_table, in_words

    gates = description["gates"]
    values = table(*gate_table(description))
    nearest = table(
        (
            f"nearest {description['threshold']:.3g}: {description['elements'][:-1]} (SNR)",
            "under",
            "at or over",
        ),
        [(gate["gate"], in_words(gate["under"]), in_words(gate["over"])) for gate in gates],
    )
    held = ", ".join(g["gate"] for g in gates if g["held"])
    if description["elements"] == "units":
        held = f"all units under the threshold, the best kept: {held}" if held else ""
    else:
        held = f"all weights under the threshold: {held}" if held else ""
    left = [f"not gated: {name}, {why}" for name, why in (description["left_alone"] or {}).items()]
    if description["waiting"]:
        left.insert(0, f"no turn yet: {', '.join(description['waiting'])}")
    return "\n\n".join(p for p in (values, nearest, held, "\n".join(left)) if p)
