"""Calls of a network in several runtimes: PyTorch, torch.compile, ONNX Runtime, int8."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_sbp.deployment.batches import named_tensors
from pyro_sbp.deployment.exporting import (
    ExportError,
    check_onnx,
    export,
    largest_difference,
    output_names,
)
from pyro_sbp.deployment.quantization import quantize
from pyro_sbp.errors import RequestError, first_line, unknown
from pyro_sbp.gates.copies import fresh
from pyro_sbp.gates.folding import call
from pyro_sbp.gates.nested import tensors_of

__all__ = ["ON_CPU", "RUNTIMES", "check_runtimes", "prepare"]

RUNTIMES = ("eager", "compile", "onnxruntime", "int8")
#: The runtimes that run on the CPU only.
ON_CPU = ("onnxruntime", "int8")
#: The largest difference from eager, relative to the largest output. Convolutions on a GPU round
#: to ten bits (TF32).
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3}

#: From an input, and the CPU threads to take, to a call of the network on this input.
Start = Callable[[Any, int], Callable[[], Any]]


def check_runtimes(runtimes: Sequence[str]) -> None:
    """See that the runtimes are there.

    Raises:
        RequestError: one is unknown, is not installed, or needs a compiler that is not installed.
    """
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise RequestError(unknown("runtime", runtime, RUNTIMES))
    if not {"onnxruntime", "int8"}.isdisjoint(runtimes):
        check_onnx()
    if "compile" in runtimes:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            raise RequestError(
                "torch.compile needs a C++ compiler: install g++, or name one in CXX"
            ) from error


def prepare(
    net: nn.Module, runtime: str, input_shape: Any, calibration: Sequence[Any] = ()
) -> Start:
    """Prepare a network for a runtime.

    Args:
        net: the network in evaluation mode, on the device to measure it on.
        runtime: "eager"; "compile", `torch.compile` with Inductor, of the whole network and for one
            shape; "onnxruntime", the program that `export` writes, on the CPU; or "int8", the
            program of `quantize`, also in ONNX Runtime.
        input_shape: the shape of one example, or an example input, as for `export`.
        calibration: for "int8", batches of training inputs.

    Returns:
        What starts it: ``start(x, threads)`` for an input ``x`` gives a function without arguments
        that calls the network on ``x``. It is called as it was started: with
        torch at so many threads, and in the same inference mode. Starting compiles, and compares
        the output with eager's: `ExportError` where it cannot, or where they differ by more than
        1e-5 of the largest output (1e-3 on a GPU). `quantize` has compared the outputs of "int8".

    Raises:
        ExportError: ONNX cannot express the network.
    """
    if runtime == "eager":
        return lambda x, threads: _bound(net, x)
    if runtime == "int8":
        return _session(net, quantize(net, calibration))
    start = {"compile": _compile, "onnxruntime": _onnxruntime}[runtime](net, input_shape)

    def compared(x: Any, threads: int) -> Callable[[], Any]:
        given = fresh(x)
        expected = call(net, fresh(x))
        begun = start(x, threads)
        for tensor, value in zip(tensors_of(x), tensors_of(given), strict=True):
            tensor.copy_(value)  # a network may have changed it in place
        difference = largest_difference(expected, begun())
        tolerance = TOLERANCE[next(tensors_of(x)).device.type]
        if not difference <= tolerance:
            raise ExportError(
                f"the network in {runtime} differs from eager by {difference:.1e} of the largest "
                f"output; at most {tolerance:.0e} is allowed"
            )
        return begun

    return compared


def _bound(function: Callable[..., Any], x: Any) -> Callable[[], Any]:
    """A call on an input without arguments, and without `call` inside what is measured."""
    if isinstance(x, Mapping):
        return partial(function, **x)
    return partial(function, *x) if isinstance(x, tuple) else partial(function, x)


def _compile(net: nn.Module, input_shape: Any) -> Start:
    def start(x: Any, threads: int) -> Callable[[], Any]:
        begun = _bound(torch.compile(net, fullgraph=True, dynamic=False), x)
        try:
            begun()
        except Exception as error:  # compilers raise what they like
            raise ExportError(
                f"torch.compile cannot compile the network: {first_line(error)}"
            ) from error
        return begun

    return start


def _onnxruntime(net: nn.Module, input_shape: Any) -> Start:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "net.onnx"
        export(net, path, input_shape, "onnx")
        return _session(net, path.read_bytes())


def _session(net: nn.Module, program: bytes) -> Start:
    """An ONNX program in ONNX Runtime."""
    import onnxruntime

    def start(x: Any, threads: int) -> Callable[[], Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        # All are in torch's memory, so no call copies them.
        inputs = {name: value.contiguous() for name, value in named_tensors(net, x).items()}
        outputs = [
            torch.empty_like(y, memory_format=torch.contiguous_format)
            for y in tensors_of(call(net, fresh(x)))
        ]
        taken = {item.name for item in session.get_inputs()}
        binding = session.io_binding()
        for bind, values in (
            (binding.bind_input, {n: v for n, v in inputs.items() if n in taken}),
            (binding.bind_output, dict(zip(output_names(len(outputs)), outputs, strict=True))),
        ):
            for name, value in values.items():
                array = value.numpy()
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

        def run(inputs: Any = inputs) -> Any:  # holds the inputs, which the binding does not
            session.run_with_iobinding(binding)
            return outputs[0] if len(outputs) == 1 else outputs

        return run

    return start
