"""The devices and the precision of a run, with Lightning Fabric.

A run on several devices has one process per device. All processes take the same steps: each gets a
share of every batch and draws its own noise, and gradients are averaged. Only the first process
writes files. Either Fabric starts the other processes by running the same command again, or
`torchrun` starts all of them.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from pyro_sbp.errors import OtherProcessError, RequestError
from pyro_sbp.training.processes import (
    forget_stray_variables,
    num_processes,
    processes_here,
    starting_copies,
)

__all__ = [
    "dtype_of",
    "fastest_precision",
    "gather",
    "in_step",
    "launch",
    "leave",
    "on_first",
    "random_state",
    "set_random_state",
    "sum_over_processes",
]

_Precision = Literal["32-true", "64-true", "bf16-mixed"]
#: Parts of the messages of gloo about a process that has ended.
GONE = ("closed by peer", "reset by peer", "Broken pipe")


def launch(
    device: str = "cpu",
    devices: int = 1,
    precision: str = "32-true",
    threads: int | None = None,
) -> Fabric:
    """Start the processes of a run, and wait until all have started.

    Stray variables of a process group (see `forget_stray_variables`) are removed from the
    environment. With one device, they are restored when the function returns. With several
    devices they are not restored, because the run reads its group from these variables.

    Args:
        device: "cpu" or "cuda".
        devices: the number of devices on all machines, with one process each; under `torchrun`, the
            number of processes that it started.
        precision: "32-true", "64-true" or "bf16-mixed".
        threads: the number of CPU threads of each process; by default that of torch.

    Raises:
        RequestError: the machine has fewer devices, or `torchrun` started another number of
            processes.
    """
    external = num_processes()
    if external is not None and external != devices:
        raise RequestError(f"the run is for {devices} devices, but torchrun started {external}")
    here = devices if external is None else processes_here()
    if device == "cuda" and torch.cuda.device_count() < here:
        raise RequestError(f"devices is {here}; this machine has {torch.cuda.device_count()}")
    stray = forget_stray_variables()
    # Without this, Fabric logs every process that joins.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy: Any = SingleDeviceStrategy(torch.device(device, 0) if device == "cuda" else "cpu")
    if devices > 1:
        # A phase may not use all parameters of the network, but it uses the same ones in each step.
        strategy = DDPStrategy(static_graph=True)
    fabric = Fabric(
        accelerator=device,
        devices=here,
        num_nodes=devices // here,
        strategy=strategy,
        precision=cast(_Precision, precision),
        # Explicit, because Fabric would also read a group from the variables of SLURM, LSF or MPI.
        plugins=LightningEnvironment() if external is None else TorchElasticEnvironment(),
    )
    with ExitStack() as stack:
        if devices > 1:
            stack.enter_context(_ended_by_signals())
        else:
            stack.callback(os.environ.update, stray)
        if external is None:
            stack.enter_context(starting_copies(threads))
        fabric.launch()
    if threads is not None:  # Fabric sets another number
        torch.set_num_threads(threads)
    return fabric


def leave() -> None:
    """End the process group of a run that has finished on all processes.

    Otherwise its threads still run when the interpreter exits, which may abort the process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within the context, SIGINT and SIGTERM end the process. Python handles no signals while
    Fabric waits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of parameters and inputs. With "bf16-mixed" it is float32, and autocast uses
    bfloat16 in some operations."""
    return torch.float64 if precision == "64-true" else torch.float32


def fastest_precision(device: str) -> str:
    """The faster of "32-true" and "bf16-mixed" on a device, "cpu" or "cuda".

    It is "bf16-mixed" if the device has instructions for products in bfloat16: a GPU that supports
    it, or a CPU with AVX512-BF16 or AMX. Other devices emulate bfloat16 and are many times slower.
    """
    if device == "cuda":
        return (
            "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
        )
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16-mixed" if has_bf16 else "32-true"


_Result = TypeVar("_Result")


def on_first(fabric: Fabric, function: Callable[[], _Result]) -> _Result | None:
    """Call a function on the first process, while the others wait.

    Returns:
        The result of the function; None on the other processes.

    Raises:
        OtherProcessError: the function failed, and this is another process.
    """
    result, failure = None, None
    if fabric.is_global_zero:
        try:
            result = function()
        except BaseException as error:  # raised below, after the other processes were informed
            failure = error
    failed = fabric.broadcast(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise OtherProcessError
    return result


@contextmanager
def in_step(fabric: Fabric) -> Iterator[None]:
    """Within the context, the end of another process raises `OtherProcessError`."""
    try:
        yield
    except RuntimeError as error:
        if fabric.world_size == 1 or not any(words in str(error) for words in GONE):
            raise
        raise OtherProcessError from error


def gather(fabric: Fabric, value: Any) -> list[Any]:
    """Gather the values of all processes on each process, ordered by rank."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def sum_over_processes(fabric: Fabric, value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on each process."""
    total = fabric.all_reduce(value.clone(), reduce_op="sum")
    assert isinstance(total, Tensor)
    return total


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the random generators of this process, by device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Restore the states that `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
