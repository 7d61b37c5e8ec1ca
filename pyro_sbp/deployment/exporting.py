"""Write a pruned network as a program that needs no pyro-sbp: ONNX or torch.export's pt2."""

from __future__ import annotations

import copy
import io
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.deployment.file_sets import sync
from pyro_sbp.errors import RequestError, first_line

__all__ = ["FORMATS", "ExportError", "check_onnx", "export"]

FORMATS = ("onnx", "pt2")
#: The largest difference of the program from the network, relative to the largest output.
TOLERANCE = 1e-5
#: The batch sizes that a program is tried on; the first one is what it is traced with.
BATCHES = (2, 1, 5)


class ExportError(RuntimeError):
    """The program cannot be made, or does not compute what the network computes."""


def check_onnx() -> None:
    """See that ONNX programs can be written and run.

    Raises:
        RequestError: a package for it is not installed.
    """
    if any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
        raise RequestError("ONNX needs more packages: pip install 'pyro-sbp[export]'")


def export(
    net: nn.Module, path: str | os.PathLike[str], input_shape: Sequence[int], format: str
) -> float:
    """Write a network as a program with a dynamic batch size, and run the program.

    Args:
        net: the network, from one tensor ``[batch, *input_shape]`` to one tensor.
        path: the file to write; it appears whole, and checked, or not at all.
        input_shape: the shape of one example.
        format: "onnx" or "pt2".

    Returns:
        The largest difference of the program's outputs from the network's, relative to the largest
        output, on random inputs.

    Raises:
        RequestError: the format is unknown or needs a package that is not installed, the network
            does not take inputs of the shape, or the file cannot be written.
        ExportError: the program cannot be made, or differs by more than 1e-5.
    """
    if format not in FORMATS:
        raise RequestError(f"unknown format {format!r}; expected {' or '.join(FORMATS)}")
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise RequestError(f"cannot write {path}: it is no file in a writable directory")
    net = copy.deepcopy(net).cpu().eval()
    generator = torch.Generator().manual_seed(0)
    dtypes = (p.dtype for p in net.parameters() if p.is_floating_point())
    dtype = next(dtypes, torch.float32)
    try:
        inputs = [
            torch.rand(size, *input_shape, generator=generator, device="cpu").to(dtype)
            for size in BATCHES
        ]
        with torch.no_grad():
            output = net(inputs[0])
    except Exception as error:  # a network may raise anything for an input of a wrong shape
        raise RequestError(
            f"the network does not take inputs of shape {input_shape}: {first_line(error)}"
        ) from error
    if not isinstance(output, Tensor):
        raise ExportError(f"the network gives a {type(output).__name__}; expected one tensor")
    partial = path.with_name(f"{path.name}.part.{format}")
    try:
        with _quiet():
            run = {"onnx": _onnx, "pt2": _pt2}[format](net, inputs[0], partial)
            try:
                difference = max(_difference(net, run, x) for x in inputs)
            except Exception as error:  # the program of a runtime may raise anything
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


def _difference(net: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    with torch.no_grad():
        expected, actual = net(x), run(x)
    return float((expected - actual).abs().max() / expected.abs().max().clamp_min(1e-30))


def _pt2(net: nn.Module, x: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # torch.export raises what tracing a network's code raises
        raise ExportError(f"torch.export cannot trace the network: {first_line(error)}") from error
    # In memory first, so that a full disk raises OSError, and not a RuntimeError of torch.
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    return torch.export.load(path).module()


def _external(path: Path) -> Path:
    """Where torch puts the weights of an ONNX program that are too large for its file."""
    return path.with_name(path.name + ".data")


def _onnx(net: nn.Module, x: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    check_onnx()
    import onnxruntime

    try:
        program = torch.onnx.export(
            net,
            (x,),
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # as above
        raise ExportError(f"torch.onnx cannot trace the network: {first_line(error)}") from error
    assert program is not None
    program.save(path)
    if _external(path).exists():
        raise ExportError("the program needs more than the 2 GB of an ONNX file; expected pt2")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        (output,) = session.run(None, {"input": x.numpy()})
        return torch.from_numpy(output)

    return run


@contextmanager
def _quiet() -> Any:
    """Without the exporters' own remarks."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
