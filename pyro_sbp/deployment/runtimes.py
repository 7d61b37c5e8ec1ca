"""Run a network in several runtimes: PyTorch, torch.compile, ONNX Runtime, int8."""

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
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.copies import fresh
from pyro_sbp.gates.nested import tensors_of

__all__ = ["ON_CPU", "RUNTIMES", "check_runtimes", "prepare"]

RUNTIMES = ("eager", "compile", "onnxruntime", "int8")
#: The runtimes that run ONNX programs, on the CPU only.
ON_CPU = ("onnxruntime", "int8")
#: The largest allowed difference from eager PyTorch, relative to the largest output. Convolutions
#: on a GPU round their inputs to TF32, which has ten bits of mantissa.
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3}

#: A function from an input and a number of CPU threads to a call of the network on this input.
Start = Callable[[Any, int], Callable[[], Any]]


def check_runtimes(runtimes: Sequence[str]) -> None:
    """Check that the runtimes can be used.

    Raises:
        RequestError: a runtime is unknown or not installed, or needs a compiler that is not
            installed.
    """
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise RequestError(unknown("runtime", runtime, RUNTIMES))
    if not set(ON_CPU).isdisjoint(runtimes):
        check_onnx()
    if "compile" in runtimes:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            raise RequestError(
                "torch.compile needs a C++ compiler: install g++, or set CXX to a compiler"
            ) from error


def prepare(
    net: nn.Module, runtime: str, input_shape: Any, calibration: Sequence[Any] = ()
) -> Start:
    """Prepare a network for a runtime.

    Args:
        net: the network in evaluation mode, on the device of the measurement.
        runtime: "eager"; "compile" (`torch.compile` with Inductor, for the whole network and one
            shape); "onnxruntime" (the program from `export`, on the CPU); or "int8" (the program
            from `quantize`, in ONNX Runtime).
        input_shape: the shape of one example, or an example input, as for `export`.
        calibration: for "int8", batches of training inputs.

    Returns:
        A function ``start``. ``start(x, threads)`` returns a function without arguments that calls
        the network on ``x``. When you call ``start`` and the returned function, torch must have the
        same number of threads and the same inference mode. ``start`` compiles the network if
        necessary, and compares the outputs with those of eager PyTorch. It raises `ExportError` if
        the network cannot be compiled, or if the difference is more than 1e-5 of the largest output
        (1e-3 on a GPU). The outputs of "int8" are compared by `quantize` instead.

    Raises:
        ExportError: the network cannot be exported or quantized.
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
            tensor.copy_(value)  # the network may have changed its input in place
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
    """A function without arguments that calls another function on an input. It is faster than
    `call`."""
    if isinstance(x, Mapping):
        return partial(function, **x)
    return partial(function, *x) if isinstance(x, tuple) else partial(function, x)


def _compile(net: nn.Module, input_shape: Any) -> Start:
    def start(x: Any, threads: int) -> Callable[[], Any]:
        begun = _bound(torch.compile(net, fullgraph=True, dynamic=False), x)
        try:
            begun()
        except Exception as error:  # a compiler may raise anything
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
    """A function as `prepare` returns it, for an ONNX program in ONNX Runtime."""
    import onnxruntime

    def start(x: Any, threads: int) -> Callable[[], Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        # Inputs and outputs are in the memory of torch tensors, so that calls do not copy them.
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

        def run(inputs: Any = inputs) -> Any:  # keeps the inputs alive, which the binding does not
            session.run_with_iobinding(binding)
            return outputs[0] if len(outputs) == 1 else outputs

        return run

    return start
