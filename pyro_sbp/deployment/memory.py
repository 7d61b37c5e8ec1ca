"""Measure the size of a network's file, and the memory of a call."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_sbp.deployment.saving import METADATA
from pyro_sbp.deployment.shared_tensors import unique_tensors
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.copies import fresh
from pyro_sbp.gates.nested import tensors_of

__all__ = ["file_size", "peak_memory"]


def file_size(net: nn.Module) -> int:
    """The size in bytes of a network as `save` would store it."""
    tensors = unique_tensors(net)[0].items()
    # As with `Module.to`, the counters of batch norms remain integers.
    content = {n: v.float() if v.is_floating_point() else v for n, v in tensors}
    return len(serialize(content, METADATA))


class _Allocations(TorchDispatchMode):
    """Tracks the tensors that operations create, and their total size in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result


def peak_memory(net: nn.Module, x: Any) -> int:
    """The largest total size of all tensors during one call of a network, in bytes.

    The size includes the parameters and buffers, the input, and the results of operations, each
    until it is freed. The working memory inside an operation is not counted.

    Args:
        net: the network, in evaluation mode.
        x: its input.
    """
    x = fresh(x)
    held = [*net.parameters(), *net.buffers(), *tensors_of(x)]
    before = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())
    with torch.no_grad(), _Allocations() as allocations:
        allocations._known.update(t.untyped_storage()._cdata for t in held)
        call(net, x)
    return before + allocations.peak
