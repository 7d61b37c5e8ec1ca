"""A network's calls in the runtimes it may be handed to: PyTorch, torch.compile, ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.deployment.exporting import ExportError, check_onnx, export
from pyro_sbp.errors import RequestError, first_line, unknown

__all__ = ["RUNTIMES", "check_runtimes", "prepare"]

RUNTIMES = ("eager", "compile", "onnxruntime")
#: The largest difference from eager, relative to the largest output. Convolutions on a GPU round
#: to ten bits (TF32).
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3}

#: From an input, and the CPU threads to take, to a call of the network on this input.
Start = Callable[[Tensor, int], Callable[[], Any]]


def check_runtimes(runtimes: Sequence[str]) -> None:
    """See that the runtimes are there.

    Raises:
        RequestError: one is unknown, is not installed, or needs a compiler that is not installed.
    """
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise RequestError(unknown("runtime", runtime, RUNTIMES))
    if "onnxruntime" in runtimes:
        check_onnx()
    if "compile" in runtimes:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            raise RequestError(
                "torch.compile needs a C++ compiler: install g++, or name one in CXX"
            ) from error


def prepare(net: nn.Module, runtime: str, input_shape: Sequence[int]) -> Start:
    """Hand a network to a runtime.

    Args:
        net: the network in evaluation mode, on the device to measure it on.
        runtime: "eager"; "compile", `torch.compile` with Inductor, of the whole network and for one
            shape; or "onnxruntime", the program that `export` writes, on the CPU.
        input_shape: the shape of one example.

    Returns:
        What starts it: ``start(x, threads)`` for ``x`` ``[batch, *input_shape]`` gives a function
        without arguments that calls the network on ``x``. It is called as it was started: with
        torch at so many threads, and in the same inference mode. Starting compiles, and compares
        the output with eager's: `ExportError` where it cannot, or where they differ by more than
        1e-5 of the largest output (1e-3 on a GPU).

    Raises:
        ExportError: ONNX cannot express the network.
    """
    if runtime == "eager":
        return lambda x, threads: partial(net, x)
    start = {"compile": _compile, "onnxruntime": _onnxruntime}[runtime](net, input_shape)

    def compared(x: Tensor, threads: int) -> Callable[[], Any]:
        expected = net(x)
        if not isinstance(expected, Tensor):
            raise ExportError(f"the network gives a {type(expected).__name__}; expected one tensor")
        call = start(x, threads)
        difference = float((expected - call()).abs().max() / expected.abs().max().clamp_min(1e-30))
        tolerance = TOLERANCE[x.device.type]
        if not difference <= tolerance:
            raise ExportError(
                f"the network in {runtime} differs from eager by {difference:.1e} of the largest "
                f"output; at most {tolerance:.0e} is allowed"
            )
        return call

    return compared


def _compile(net: nn.Module, input_shape: Sequence[int]) -> Start:
    def start(x: Tensor, threads: int) -> Callable[[], Any]:
        call = partial(torch.compile(net, fullgraph=True, dynamic=False), x)
        try:
            call()
        except Exception as error:  # compilers raise what they like
            raise ExportError(
                f"torch.compile cannot compile the network: {first_line(error)}"
            ) from error
        return call

    return start


def _onnxruntime(net: nn.Module, input_shape: Sequence[int]) -> Start:
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "net.onnx"
        export(net, path, input_shape, "onnx")
        program = path.read_bytes()

    def start(x: Tensor, threads: int) -> Callable[[], Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        # Both lie in torch's memory: no call copies them.
        x, y = x.contiguous(), torch.empty_like(net(x), memory_format=torch.contiguous_format)
        binding = session.io_binding()
        for bind, name, value in (
            (binding.bind_input, "input", x),
            (binding.bind_output, "output", y),
        ):
            array = value.numpy()
            bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

        def call(x: Tensor = x) -> Tensor:  # holds the input, which the binding does not
            session.run_with_iobinding(binding)
            return y

        return call

    return start
