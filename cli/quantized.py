"""The data and the table of `pyro-sbp bench --runtime int8`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_sbp.datasets.sources import check_dataset
from pyro_sbp.recipes.request import Request

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyro_sbp.datasets.loading import ImageData
    from pyro_sbp.deployment.benchmarking import Latency

__all__ = ["calibration_batches", "comparison", "run_data"]

#: The number of training images by which the ranges of activations are measured, and the batch
#: size in which images are passed to the networks.
IMAGES, BATCH = 512, 64


def run_data(request: Request, size: int | None) -> ImageData:
    """The data of a run on the CPU, prepared as in training.

    Args:
        request: the request of the run.
        size: the size of the images that the architecture expects.
    """
    data_dir = Path(request.data_dir)
    check_dataset(request.dataset, data_dir)

    import torch

    from pyro_sbp.datasets.loading import load_dataset
    from pyro_sbp.training.job import prepare_data

    cpu = torch.device("cpu")
    data = load_dataset(request.dataset, data_dir, request.image_size or size, device="cpu")
    return prepare_data(request, data, cpu)


def calibration_batches(data: ImageData, seed: int) -> list[Tensor]:
    """Batches of training images, drawn at random."""
    import torch

    order = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train), generator=order, device="cpu")[:IMAGES]
    return [x.float() for x, _ in data.train.batches(chosen.split(BATCH))]


def comparison(
    dense: nn.Module,
    pruned: nn.Module,
    program: bytes,
    data: ImageData,
    dense_error: float | None,
    latencies: Sequence[Latency],
) -> tuple[list[str], list[list[str]]]:
    """A table of the dense network, the pruned one, and the pruned one in int8.

    Args:
        dense, pruned: the networks.
        program: the pruned network in int8, from `quantize`.
        data: the data; the errors are those on the test images.
        dense_error: the test error of the dense network in percent, if the run has measured it.
        latencies: of `benchmark`, in eager PyTorch and in int8.

    Returns:
        The head and the rows.
    """
    from pyro_sbp.deployment.memory import file_size, peak_memory
    from pyro_sbp.deployment.quantization import outputs_of

    def images() -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        places = torch.arange(len(data.test), device="cpu").split(BATCH)
        for x, y in data.test.batches(places):
            yield x.float(), y

    import torch

    with torch.inference_mode():
        classes = torch.cat([pruned(x).argmax(1) for x, _ in images()])
        in_int8 = outputs_of(program, pruned, (x for x, _ in images()))
        quantized = torch.cat([output.argmax(1) for (output,) in in_int8])
    labels = torch.cat([y for _, y in images()])

    def error(found: Tensor) -> float:
        return 100 * float((found != labels).double().mean())

    errors = {"dense": dense_error, "pruned": error(classes), "int8": error(quantized)}
    example = next(images())[0]
    sizes = [file_size(dense), file_size(pruned), len(program)]
    peaks: list[int | None] = [peak_memory(net, example[:1].clone()) for net in (dense, pruned)] + [
        None
    ]
    agreement = 100 * float((classes == quantized).double().mean())
    head = ["network", "error, %", "same class, %", "file, kB", "peak memory, kB"]
    rows = [
        [
            name,
            "-" if value is None else f"{value:.2f}",
            {"dense": "-", "pruned": "100.0"}.get(name, f"{agreement:.1f}"),
            f"{size / 1e3:,.1f}",
            "-" if peak is None else f"{peak / 1e3:,.1f}",
        ]
        for (name, value), size, peak in zip(errors.items(), sizes, peaks, strict=True)
    ]
    for latency in latencies:
        if latency.runtime != "eager" or not latency.device.startswith("cpu"):
            continue
        (other,) = (
            x
            for x in latencies
            if (x.runtime, x.threads, x.batch_size) == ("int8", latency.threads, latency.batch_size)
        )
        head.append(f"ms, batch {latency.batch_size}, threads {latency.threads}")
        times = (latency.dense_ms, latency.pruned_ms, other.pruned_ms)
        for row, milliseconds in zip(rows, times, strict=True):
            row.append(f"{milliseconds:.3f}")
    rows[2][0] = "pruned, int8"
    return head, rows
