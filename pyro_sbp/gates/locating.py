"""Find the first module in which a cut network fails or differs from the masked network."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.gates.gate import Gate

__all__ = ["Trail", "failing_code", "failing_module", "suspects"]

#: The largest relative difference between sums over the outputs of two equivalent modules.
_TOLERANCE = 1e-7
#: The directories with code that does not belong to networks: torch and this package.
_NOT_OF_NETWORKS = tuple(
    str(Path(file).parent) for file in (torch.__file__, Path(__file__).parent) if file
)
#: The largest number of characters of code in a message.
_LONGEST = 100


class Trail:
    """Sums over the outputs of the modules in one call of a network, in the order of completion.

    Attributes:
        ends: for every completed call, the name of the module, the shape of its first output, and
            the sums of its elements and of their absolute values.
        inside: the names of the modules whose calls are not complete.
    """

    def __init__(self) -> None:
        self.ends: list[tuple[str, torch.Size, tuple[float, float]]] = []
        self.inside: list[str] = []

    @contextmanager
    def followed(self, net: nn.Module) -> Iterator[None]:
        """A context in which the calls of the modules of a network are recorded."""

        def begin(name: str) -> None:
            self.inside.append(name)

        def end(name: str, out: Any) -> None:
            self.inside.pop()
            if isinstance(out, list | tuple) and out:
                out = out[0]
            if isinstance(out, Tensor) and out.is_floating_point():
                sums = float(out.sum()), float(out.abs().sum())
                self.ends.append((name, out.shape, sums))

        with ExitStack() as hooks:
            for name, module in net.named_modules():
                before = module.register_forward_pre_hook(lambda *_, n=name: begin(n))
                hooks.callback(before.remove)
                after = module.register_forward_hook(lambda m, a, out, n=name: end(n, out))
                hooks.callback(after.remove)
            yield

    def first_difference(self, other: Trail) -> str | None:
        """The first module whose output differs in another call, or in which the other call failed.

        Modules whose outputs have different shapes in the two calls are skipped.

        Args:
            other: the trail of the other call, of the same network or of a smaller one.

        Returns:
            The name of the module, or None if no difference is found.
        """
        for (name, shape, sums), (other_name, other_shape, other_sums) in zip(
            self.ends, other.ends, strict=False
        ):
            if name != other_name:
                return name
            scale = max(sums[1], 1e-30)
            far = any(
                not abs(a - b) <= _TOLERANCE * scale for a, b in zip(sums, other_sums, strict=True)
            )
            if shape == other_shape and far:
                return name
        return other.inside[-1] if other.inside else None


def suspects(gates: Sequence[Gate], module: str) -> list[str]:
    """The names of the gates that have a layer inside a module.

    If there are none, those with a layer inside the nearest module around it that has some.

    Args:
        gates: the gates.
        module: the name of the module.
    """
    while True:
        found = [
            gate.name
            for gate in gates
            if any(
                span.layer == module or span.layer.startswith(f"{module}.")
                for span in (*gate.writers, *gate.readers, *gate.channelwise)
            )
        ]
        if found or "." not in module:
            return found
        module = module.rpartition(".")[0]


def failing_module(error: BaseException, names: Mapping[int, str]) -> str | None:
    """The innermost module whose method raised an error, or None.

    Args:
        error: the error.
        names: from the id of each module of the network to its name.
    """
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = names.get(id(frame.f_locals.get("self")), found)
    return found


def failing_code(error: BaseException) -> str:
    """The expression in the code of a network that raised an error, as the end of a message.

    It is empty if the source code is not available.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(_NOT_OF_NETWORKS) or not frame.line:
            continue
        line = linecache.getline(frame.filename, frame.lineno or 0)
        one = frame.lineno == frame.end_lineno
        part = line.encode()[frame.colno : frame.end_colno] if one else b""
        code = part.decode(errors="ignore") or frame.line
        code = code if len(code) <= _LONGEST else f"{code[:_LONGEST]}..."
        return f", in `{code}` ({Path(frame.filename).name}, line {frame.lineno})"
    return ""
