"""pyro-sbp export: write the pruned network of a run as a program that needs no pyro-sbp."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pyro_sbp.architectures import find_architecture
from pyro_sbp.cli.common import find_network, read_network, read_request
from pyro_sbp.errors import RequestError

__all__ = ["export"]


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--format", required=True, type=click.Choice(["onnx", "pt2"]))
@click.option(
    "--output", type=click.Path(path_type=Path), help="The file.  [default: beside the network]"
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def export(run: Path | None, format: str, output: Path | None, as_json: bool) -> None:
    """Write the pruned network as ONNX or pt2.

    RUN is a run directory, or one of its pruned-… networks; the newest run if it is left out. The
    program takes any batch size, and is run and compared before it gets its name.
    """
    run, saved = find_network(run)
    output = output or run / f"{saved.name}.{format}"
    architecture = find_architecture(read_request(run).arch)
    _, shape = read_network(saved)

    from pyro_sbp.deployment import exporting
    from pyro_sbp.deployment.saving import load

    try:
        net = load(saved, architecture.resolve())
    except ValueError as error:
        raise RequestError(str(error)) from error
    difference = exporting.export(net, output, shape, format)
    if as_json:
        found = {"file": str(output), "format": format, "max_rel_diff": difference}
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(f"{output}: agrees with the network to {difference:.1e} of the largest output")
