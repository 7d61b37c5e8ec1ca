"""pyro-sbp inspect: show the posterior of a run."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import click

from pyro_sbp.cli.common import criterion_option, find_run
from pyro_sbp.text_tables import table
from pyro_sbp.training.runs import Run

__all__ = ["inspect"]


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@criterion_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def inspect(run: Path | None, criterion: str | None, as_json: bool) -> None:
    """Show the posterior of a run.

    For each gate it prints quantiles of the score that decides which units are kept, by default
    the signal-to-noise ratio (SNR). It also prints the units closest to the threshold, and which
    input features are kept. Units are named by their indices. With the method sparse-vd it prints
    the same for the weights of each layer.
    A gate is named after the first layer that writes its units: attn.query, for example, is the
    gate of the heads of attn.

    RUN is a run directory of a finished run, or of one that was interrupted after its first epoch
    with noise; by default the newest run. The data and the code of the network are not needed.
    """
    found = Run.read(find_run(run, finished=False))
    rule = found.request.recipe.rule(criterion)

    from pyro_sbp.reports.posterior import describe, read_posterior

    description = describe(found, read_posterior(found.directory), criterion)
    if as_json:
        click.echo(json.dumps({"run": str(found.directory), **description}, indent=2))
    else:
        other = "" if rule == found.request.recipe.rule() else f"; by {rule.criterion.name}"
        click.echo(f"{found.directory}: {state(description)}{other}\n")
        click.echo(_text(description))


def state(description: dict[str, Any]) -> str:
    """One line about the epochs that a run has completed.

    Args:
        description: what `describe` returns.
    """
    epochs = f"{description['epoch']} of {description['epochs']} epochs with noise"
    if description["finished"]:
        return f"finished, {epochs}"
    return f"not finished, {epochs}; kept is the number that reaches the threshold now"


def _text(description: dict[str, Any]) -> str:
    from pyro_sbp.reasons import lines_not_prunable
    from pyro_sbp.reports.posterior import gate_table, kept_features, nearest_table

    gates = description["gates"]
    values = table(*gate_table(description))
    nearest = table(*nearest_table(description))
    held = ", ".join(g["gate"] for g in gates if g["held"])
    if description["elements"] == "units":
        held = (
            f"all units are under the threshold, so only the best is kept: {held}" if held else ""
        )
    else:
        held = f"all weights under the threshold: {held}" if held else ""
    features = [
        textwrap.fill(f"input features kept, {gate}: {indices}", 100, subsequent_indent="  ")
        for gate, indices in kept_features(description).items()
    ]
    left = lines_not_prunable(description["left_alone"] or {}, description["shares"])
    if description["waiting"]:
        left.insert(0, f"no noise yet: {', '.join(description['waiting'])}")
    return "\n\n".join(p for p in (values, nearest, held, *features, "\n".join(left)) if p)
