"""pyro-sbp export: write the pruned network of a run to ONNX, pt2 or ExecuTorch."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pyro_sbp.architectures import find_architecture
from pyro_sbp.cli.common import find_network, read_network
from pyro_sbp.errors import RequestError
from pyro_sbp.training.runs import read_request

__all__ = ["export"]


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option(
    "--format",
    required=True,
    type=click.Choice(["onnx", "pt2", "executorch"]),
    help="File format: ONNX (onnx), torch.export (pt2), or ExecuTorch for phones and embedded "
    "devices (executorch).",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write.  [default: RUN/pruned.onnx, .pt2 or .pte]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(run: Path | None, format: str, output: Path | None, as_json: bool) -> None:
    """Export the pruned network to ONNX, pt2 or ExecuTorch.

    RUN is a run directory, or a network that prune wrote into one (RUN/pruned-…); by default the
    newest run. The exported program accepts any batch size; with ExecuTorch, at most 16. Before
    the file is written, the outputs of the program are compared with those of the network.
    """
    run, saved = find_network(run)
    architecture = find_architecture(read_request(run).arch)
    _, shape = read_network(saved)

    from pyro_sbp.deployment import exporting
    from pyro_sbp.deployment.loading import load

    output = output or run / f"{saved.name}.{exporting.SUFFIXES[format]}"
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
