"""The latencies by which a run weights its KL divergence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning_fabric import Fabric
from torch import Tensor

from pyro_sbp.deployment.unit_latency import UnitLatency
from pyro_sbp.errors import RequestError
from pyro_sbp.methods.gated import GatedMethod
from pyro_sbp.methods.phased import PhasedTraining
from pyro_sbp.training.devices import on_first
from pyro_sbp.training.latency_file import read_unit_latency, write_unit_latency

__all__ = ["set_unit_latency"]


def set_unit_latency(
    method: PhasedTraining, directory: Path, fabric: Fabric, example: Callable[[], Tensor]
) -> None:
    """Give the method the latencies of its units, if its KL divergence is weighted by them.

    They are measured at the beginning of the run, by the first process, and are written into the
    run directory. A resumed run reads them, because the weights of the KL divergence must not
    change.

    Args:
        method: the method.
        directory: the run directory.
        fabric: the devices.
        example: returns images as the network receives them.

    Raises:
        RequestError: the latencies cannot be read, or no unit adds latency.
    """
    if not isinstance(method, GatedMethod) or method.recipe.cost != "latency":
        return

    def measured() -> UnitLatency:
        if not (directory / "checkpoint.pt").exists():
            write_unit_latency(directory, method.measure_latency(example()))
        return read_unit_latency(directory)

    found = fabric.broadcast(on_first(fabric, measured))
    assert found is not None
    try:
        found.relative()
    except ValueError as error:
        raise RequestError(str(error)) from error
    method.unit_latency = found
