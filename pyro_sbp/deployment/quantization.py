"""Quantize a network to 8-bit integers, for ONNX Runtime on the CPU."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.deployment.batches import named_tensors
from pyro_sbp.deployment.exporting import ExportError, check_onnx, export, run_onnx
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.copies import copy_network, fresh
from pyro_sbp.gates.nested import tensors_of

__all__ = ["TOLERANCE", "outputs_of", "quantize"]

#: The largest allowed root mean square difference between the outputs in int8 and in float32,
#: relative to the root mean square of the outputs, on the calibration batches.
TOLERANCE = 0.1


def quantize(net: nn.Module, batches: Sequence[Any]) -> bytes:
    """Quantize a network to an ONNX program with 8-bit integers.

    The weights are quantized per output channel. The ranges of the activations are measured on the
    calibration batches (static quantization). Weights use 7 of 8 bits, because sums of 8-bit
    products can overflow on processors without VNNI instructions.

    Args:
        net: the network. Its input may have any structure. Its output consists of tensors.
        batches: calibration inputs of the network, with the batch in dimension 0. They should be
            training data.

    Returns:
        The program. Its inputs and outputs are float32 tensors with a dynamic batch size, and are
        named as in `export`.

    Raises:
        RequestError: a package that this needs is not installed.
        ExportError: the network cannot be exported to ONNX or quantized, or its outputs on the
            batches differ by more than `TOLERANCE`.
    """
    check_onnx()
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        """The calibration batches, one after the other, as ONNX Runtime reads them."""

        def __init__(self) -> None:
            self.left: Iterator[Any] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            x = next(self.left, None)
            if x is None:
                return None
            return {name: value.cpu().numpy() for name, value in named_tensors(net, x).items()}

    net = copy_network(net).cpu().float().eval()
    with tempfile.TemporaryDirectory() as directory:
        plain, prepared, small = (
            Path(directory) / f"{n}.onnx" for n in ("net", "prepared", "int8")
        )
        export(net, plain, batches[0], "onnx")
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it recommends the preprocessing that is done below
        try:
            quantization.quant_pre_process(plain, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                small,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
            )
        except Exception as error:  # ONNX Runtime raises many types
            raise ExportError(f"the network cannot be quantized: {error}") from error
        finally:
            root.setLevel(level)
        program = small.read_bytes()
    difference = _difference(net, program, batches)
    if not difference <= TOLERANCE:
        raise ExportError(
            f"the network in int8 differs by {difference:.0%} of its outputs from float32; at most "
            f"{TOLERANCE:.0%} is allowed"
        )
    return program


def outputs_of(program: bytes, net: nn.Module, batches: Iterable[Any]) -> Iterator[list[Tensor]]:
    """The outputs of an ONNX program on batches of inputs.

    Args:
        program: the program.
        net: the network that was quantized, for the names of its inputs.
        batches: the inputs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    for x in batches:
        yield run_onnx(session, net, x)


def _difference(net: nn.Module, program: bytes, batches: Sequence[Any]) -> float:
    """The root mean square difference of the outputs, relative to their root mean square."""
    squares = torch.zeros(2, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for x, found in zip(batches, outputs_of(program, net, batches), strict=True):
            for value, other in zip(tensors_of(call(net, fresh(x))), found, strict=True):
                wrong = (other - value).double().square().sum()
                squares += torch.stack([wrong, value.double().square().sum()])
    wrong, whole = squares.sqrt().tolist()
    return wrong / whole if whole else float(wrong > 0)
