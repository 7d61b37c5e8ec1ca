"""The data and the table of `pyro-sbp bench --runtime int8`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_sbp.datasets.sources import check_dataset
from pyro_sbp.recipes.request import Request

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyro_sbp.datasets.loading import ImageData
    from pyro_sbp.deployment.benchmarking import Latency

__all__ = ["Quantized", "calibration_batches", "compare", "comparison", "run_data"]

#: The number of training images by which the ranges of activations are measured, and the batch
#: size in which images are passed to the networks.
IMAGES, BATCH = 512, 64


def run_data(request: Request) -> ImageData:
    """The data of a run on the CPU, prepared as in training."""
    check_dataset(request.dataset, Path(request.data_dir))

    import torch

    from pyro_sbp.training.job import load_data, prepare_data

    cpu = torch.device("cpu")
    return prepare_data(request, load_data(request, device=cpu), cpu)


def calibration_batches(data: ImageData, seed: int) -> list[Tensor]:
    """Batches of training images, drawn at random."""
    import torch

    order = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train), generator=order, device="cpu")[:IMAGES]
    return [x.float() for x, _ in data.train.batches(chosen.split(BATCH))]


@dataclass(frozen=True)
class Quantized:
    """A pruned network in int8, compared with float32 on the test images.

    Attributes:
        pruned_error: the error of the pruned network in float32, in percent.
        int8_error: the error of the pruned network in int8, in percent.
        same_class: the percentage of images of which both predict the same class.
        int8_file_bytes: the size of the program in int8.
    """

    pruned_error: float
    int8_error: float
    same_class: float
    int8_file_bytes: int


def compare(pruned: nn.Module, program: bytes, data: ImageData) -> Quantized:
    """Compare a pruned network in int8 and in float32 on the test images.

    Args:
        pruned: the network.
        program: the network in int8, from `quantize`.
        data: the data.
    """
    import torch

    from pyro_sbp.deployment.quantization import outputs_of

    def images() -> Iterator[tuple[Tensor, Tensor]]:
        places = torch.arange(len(data.test), device="cpu").split(BATCH)
        for x, y in data.test.batches(places):
            yield x.float(), y

    with torch.inference_mode():
        classes = torch.cat([pruned(x).argmax(1) for x, _ in images()])
        in_int8 = outputs_of(program, pruned, (x for x, _ in images()))
        quantized = torch.cat([output.argmax(1) for (output,) in in_int8])
    labels = torch.cat([y for _, y in images()])

    def percentage(found: Tensor) -> float:
        return 100 * float(found.double().mean())

    return Quantized(
        pruned_error=percentage(classes != labels),
        int8_error=percentage(quantized != labels),
        same_class=percentage(classes == quantized),
        int8_file_bytes=len(program),
    )


def comparison(
    found: Quantized,
    dense_error: float | None,
    sizes: Mapping[str, int],
    latencies: Sequence[Latency],
) -> tuple[list[str], list[list[str]]]:
    """A table of the dense network, the pruned one, and the pruned one in int8.

    Args:
        found: from `compare`.
        dense_error: the test error of the dense network in percent, if the run has measured it.
        sizes: bytes of the files and of the peak memory of the dense and the pruned network.
        latencies: of `benchmark`, in eager PyTorch and in int8.

    Returns:
        The head and the rows.
    """

    def kilobytes(network: str) -> list[str]:
        return [f"{sizes[f'{network}_{of}_bytes'] / 1e3:,.1f}" for of in ("file", "peak")]

    head = ["network", "error, %", "same class, %", "file, kB", "peak memory, kB"]
    dense = "-" if dense_error is None else f"{dense_error:.2f}"
    quantized = [f"{found.int8_error:.2f}", f"{found.same_class:.1f}"]
    rows = [
        ["dense", dense, "-", *kilobytes("dense")],
        ["pruned", f"{found.pruned_error:.2f}", "100.0", *kilobytes("pruned")],
        ["pruned, int8", *quantized, f"{found.int8_file_bytes / 1e3:,.1f}", "-"],
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
    return head, rows
