"""Export pruned networks as programs that need no pyro-sbp: ONNX, pt2, or ExecuTorch's pte."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.deployment.batches import (
    CalledFlat,
    batch_size,
    example_of,
    has_batch,
    named_tensors,
    shapes_of,
)
from pyro_sbp.deployment.file_sets import sync
from pyro_sbp.errors import RequestError, first_line
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.copies import copy_network, fresh
from pyro_sbp.gates.nested import tensors_of
from pyro_sbp.gates.noise import check_no_noise

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "ExportError",
    "check_executorch",
    "check_onnx",
    "export",
    "largest_difference",
    "output_names",
    "run_onnx",
]

FORMATS = ("onnx", "pt2", "executorch")
#: The suffixes of the files by format.
SUFFIXES = {"onnx": "onnx", "pt2": "pt2", "executorch": "pte"}
#: The largest allowed difference between the outputs of the program and of the network, relative to
#: the largest output.
TOLERANCE = 1e-5
#: The batch sizes with which a program is tested. It is traced with the first one.
BATCHES = (2, 1, 5)
#: The largest batch size of an ExecuTorch program. ExecuTorch reserves memory for it.
LARGEST_BATCH = 16


class ExportError(RuntimeError):
    """A network cannot be exported, or the program computes another function than the network."""


def check_onnx() -> None:
    """Check that ONNX programs can be written and run.

    Raises:
        RequestError: a package that this needs is not installed.
    """
    if any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
        raise RequestError("ONNX needs more packages: pip install 'pyro-sbp[export]'")


def export(net: nn.Module, path: str | os.PathLike[str], input_shape: Any, format: str) -> float:
    """Export a network to a program with a dynamic batch size, and compare their outputs.

    Args:
        net: the network. Its input may have any structure. Its output consists of tensors.
        path: the file to write. It appears only after the comparison has succeeded.
        input_shape: the shape of one example, if the network takes one tensor
            ``[batch, *input_shape]`` of numbers in [0, 1). Otherwise an example input, as for
            `find_gates`: a tensor (for example of tokens), a tuple of positional arguments, a
            mapping of named arguments, or a dataclass. Tensors that have a row for each example get
            a dynamic first dimension.
        format: "onnx", "pt2" or "executorch". An ONNX program has one input for each tensor, with
            the name of its argument ("input" if there is only one tensor), and the outputs
            ``output``, or ``output_0`` and so on. A pt2 program takes the same arguments as the
            network. If tensors are inside lists or dataclasses, it takes all tensors as separate
            positional arguments. An ExecuTorch program takes all tensors as positional arguments,
            with at most `LARGEST_BATCH` examples. XNNPACK runs most of its layers.

    Returns:
        The largest difference between the outputs of the program and of the network, relative to
        the largest output, on random or repeated examples.

    Raises:
        RequestError: the format is unknown or needs a package that is not installed, the network
            does not accept the inputs, the noise of a `Pruner` is attached to the network, or the
            file cannot be written.
        ExportError: the network cannot be exported, or the difference is more than 1e-5.
    """
    if format not in FORMATS:
        raise RequestError(f"unknown format {format!r}; expected {', '.join(FORMATS)}")
    check_no_noise(net, "exported")
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise RequestError(
            f"cannot write {path}: expected a file in a directory that exists and is writable"
        )
    net = copy_network(net).cpu().eval()
    generator = torch.Generator().manual_seed(0)
    dtypes = (p.dtype for p in net.parameters() if p.is_floating_point())
    dtype = next(dtypes, torch.float32)
    try:
        inputs = [example_of(input_shape, dtype, size, generator) for size in BATCHES]
        with torch.no_grad():
            output = call(net, fresh(inputs[0]))
    except Exception as error:  # a network may raise anything for an input of a wrong shape
        raise RequestError(
            f"the network does not accept inputs of shape {shapes_of(input_shape)}: "
            f"{first_line(error)}"
        ) from error
    try:
        outputs = list(tensors_of(output))
    except TypeError as error:
        raise ExportError(f"the network's output is not exportable: {error}") from error
    if not outputs:
        raise ExportError(
            f"the network returns a {type(output).__name__} without tensors; expected tensors"
        )
    partial = path.with_name(f"{path.name}.part.{format}")
    try:
        with _quiet():
            write = {"onnx": _onnx, "pt2": _pt2, "executorch": _executorch}[format]
            run = write(net, inputs[0], partial)
            try:
                difference = max(_difference(net, run, x) for x in inputs)
            except Exception as error:  # a runtime may raise anything
                raise ExportError(
                    f"the {format} program cannot be run: {first_line(error)}"
                ) from error
        if not difference <= TOLERANCE:
            raise ExportError(
                f"the {format} program differs from the network by {difference:.1e} of the largest "
                f"output; at most {TOLERANCE:.0e} is allowed"
            )
        sync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
        _external(partial).unlink(missing_ok=True)
    return difference


def largest_difference(expected: Any, actual: Any) -> float:
    """The largest difference between two outputs of a network, relative to the largest absolute
    value of each tensor."""
    pairs = zip(tensors_of(expected), tensors_of(actual), strict=True)
    return max(
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        for a, b in ((a.double(), b.double()) for a, b in pairs)
    )


def _difference(net: nn.Module, run: Callable[[Any], Any], x: Any) -> float:
    with torch.no_grad():
        return largest_difference(call(net, fresh(x)), run(fresh(x)))


def _dynamic(tensor: Any, size: int) -> dict[int, Any] | None:
    """The dynamic dimensions of a value in an input with `size` examples; None if it is not a
    tensor."""
    if not isinstance(tensor, Tensor):
        return None
    return {0: torch.export.Dim("batch")} if has_batch(tensor, size) else {}


def _pt2(net: nn.Module, x: Any, path: Path) -> Callable[[Any], Any]:
    size = batch_size(x)
    parts = x.values() if isinstance(x, Mapping) else x if isinstance(x, tuple) else (x,)
    nested = any(not isinstance(part, Tensor | bool | int | float | None) for part in parts)
    called = CalledFlat(net, x) if nested else net

    def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if nested:
            return tuple(tensors_of(x)), {}
        if isinstance(x, Mapping):
            return (), dict(x)
        return (x if isinstance(x, tuple) else (x,)), {}

    args, kwargs = arguments(x)
    shapes = [_dynamic(value, size) for value in (*args, *kwargs.values())]
    if isinstance(x, Mapping) and not nested:
        dynamic: Any = dict(zip(kwargs, shapes, strict=True))
    else:
        dynamic = (tuple(shapes),) if nested else tuple(shapes)
    try:
        program = torch.export.export(called, args, kwargs, dynamic_shapes=dynamic)
    except Exception as error:  # the code of a network may raise anything
        raise ExportError(f"torch.export cannot trace the network: {first_line(error)}") from error
    # Serialise in memory first, so that a full disk raises OSError instead of a torch error.
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    loaded = torch.export.load(path).module()

    def run(x: Any) -> Any:
        args, kwargs = arguments(x)
        return loaded(*args, **kwargs)

    return run


def _external(path: Path) -> Path:
    """The file to which torch writes weights that are too large for the file of an ONNX program."""
    return path.with_name(path.name + ".data")


def _onnx(net: nn.Module, x: Any, path: Path) -> Callable[[Any], Any]:
    check_onnx()
    import onnxruntime

    size, given = batch_size(x), named_tensors(net, x)
    called = net if isinstance(x, Tensor) else CalledFlat(net, x)
    with torch.no_grad():
        outputs = list(tensors_of(call(net, fresh(x))))
    shapes = tuple(_dynamic(tensor, size) for tensor in given.values())
    try:
        program = torch.onnx.export(
            called,
            tuple(given.values()),
            input_names=list(given),
            output_names=output_names(len(outputs)),
            dynamic_shapes=shapes if called is net else (shapes,),
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # the code of a network may raise anything
        raise ExportError(f"torch.onnx cannot trace the network: {first_line(error)}") from error
    assert program is not None
    program.save(path)
    if _external(path).exists():
        raise ExportError(
            "the network is too large for an ONNX file, whose limit is 2 GB; use the format pt2"
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: run_onnx(session, net, x)


def run_onnx(session: Any, net: nn.Module, x: Any) -> list[Tensor]:
    """The outputs of an ONNX program on an input.

    Args:
        session: the ``InferenceSession`` of the program.
        net: the network that was exported, for the names of its inputs.
        x: the input.
    """
    taken = {item.name for item in session.get_inputs()}  # without unused inputs
    given = named_tensors(net, x).items()
    values = {name: tensor.cpu().numpy() for name, tensor in given if name in taken}
    return [torch.from_numpy(value) for value in session.run(None, values)]


def check_executorch() -> None:
    """Check that ExecuTorch programs can be written and run.

    Raises:
        RequestError: ExecuTorch is not installed.
    """
    if find_spec("executorch") is None:
        raise RequestError(
            "the format executorch needs another package: pip install 'pyro-sbp[executorch]'"
        )


def _executorch(net: nn.Module, x: Any, path: Path) -> Callable[[Any], Any]:
    check_executorch()
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    size, given = batch_size(x), named_tensors(net, x)
    called = net if isinstance(x, Tensor) else CalledFlat(net, x)
    batch = torch.export.Dim("batch", max=LARGEST_BATCH)
    shapes = tuple({0: batch} if has_batch(tensor, size) else {} for tensor in given.values())
    dynamic = shapes if called is net else (shapes,)
    try:
        program = torch.export.export(called, tuple(given.values()), dynamic_shapes=dynamic)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        content = lowered.to_executorch().buffer
    except Exception as error:  # the code of a network may raise anything
        raise ExportError(f"ExecuTorch cannot run the network: {first_line(error)}") from error
    path.write_bytes(content)
    method = Runtime.get().load_program(path).load_method("forward")

    def run(x: Any) -> list[Tensor]:
        # The outputs are in memory that the next call overwrites.
        return [output.clone() for output in method.execute(list(named_tensors(net, x).values()))]

    return run


def output_names(count: int) -> list[str]:
    """The names of the outputs of an ONNX program."""
    return ["output"] if count == 1 else [f"output_{place}" for place in range(count)]


@contextmanager
def _quiet() -> Any:
    """Within the context, the exporters print no messages and no warnings."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
