"""Count the multiply-accumulates (MACs) and the parameters of a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyro_sbp.gates.calling import call, evaluating
from pyro_sbp.gates.copies import fresh
from pyro_sbp.gates.layers import Select
from pyro_sbp.gates.probing import Gates
from pyro_sbp.gates.state import undone

__all__ = [
    "by_module",
    "costs_by_layer",
    "count_macs",
    "count_parameters",
    "macs_by_module",
    "original_name",
    "shares_not_prunable",
    "unfused",
]


@contextmanager
def unfused() -> Iterator[None]:
    """Within the context, torch runs attention and recurrent layers as separate matrix products.

    By default torch can run a whole attention, transformer layer or LSTM as one operation, whose
    products are not counted. Whether it does depends on the device, the dtype and the mode. The
    settings are restored at the end.
    """
    mkldnn: Any = torch.backends.mkldnn
    cudnn: Any = torch.backends.cudnn
    before = torch.backends.mha.get_fastpath_enabled(), mkldnn.enabled, cudnn.enabled
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        # Set only this flag, because `flags()` would also set the precision of float32 products.
        mkldnn.enabled = cudnn.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        mkldnn.enabled, cudnn.enabled = before[1:]


def _vector_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(a)


def _added_flops(bias: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(a) * prod(b[2:])


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


#: The floating-point operations, two for each MAC, of functions that torch's counter does not know.
#: They are computed from the shapes of the arguments.
_FORMULAS = {
    torch.ops.aten.mv: _vector_flops,
    torch.ops.aten.dot: _vector_flops,
    torch.ops.aten.vdot: _vector_flops,
    torch.ops.aten.addmv: _added_flops,
    torch.ops.aten.addbmm: _added_flops,
    # A network can select this kernel with `sdpa_kernel`.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def count_macs(net: nn.Module, example_input: Any) -> int:
    """Count the multiply-accumulates of the convolutions and matrix products in one call.

    The products inside attention and recurrent layers count as well; biases, norms, activations and
    other element-wise operations do not. The count depends only on shapes. It is the same on all
    devices, in all dtypes, and in training and evaluation mode.

    Args:
        net: the network. It is called once in evaluation mode, and its mode is restored.
        example_input: an input, as for `call`. The count is proportional to its batch size.
    """
    counter = _counter()
    with torch.no_grad(), undone(net), evaluating(net), unfused(), counter:
        call(net, fresh(example_input))
    return counter.get_total_flops() // 2


def count_parameters(net: nn.Module) -> int:
    """The number of elements of all parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def macs_by_module(net: nn.Module, example_input: Any) -> Counter[str]:
    """MACs in one call of every module, without those of the modules inside it.

    Args:
        net, example_input: as for `count_macs`.

    Returns:
        From the name of a module to its MACs. The sum is that of `count_macs`.
    """
    counter = _counter()
    with (
        torch.no_grad(),
        undone(net),
        evaluating(net),
        unfused(),
        counter,
        by_module(net, lambda: counter.get_total_flops() // 2) as macs,
    ):
        call(net, fresh(example_input))
    return macs


def costs_by_layer(net: nn.Module, example_input: Any) -> dict[str, tuple[int, int]]:
    """MACs in one call and parameters of every layer that has its own parameters.

    Operations count for the innermost module that runs them.

    Args:
        net, example_input: as for `count_macs`.

    Returns:
        From the name of a layer to its MACs and its parameters, in the order of the network.
        Operations outside of these layers, such as the products of separated attention, have the
        name "". A parameter that two layers share counts for the first one. The sums are those of
        `count_macs` and `count_parameters`.
    """
    macs = macs_by_module(net, example_input)
    seen: set[int] = set()
    costs: dict[str, tuple[int, int]] = {}
    for layer, module in net.named_modules():
        new = [p for p in module.parameters(False) if id(p) not in seen]
        if layer and any(True for _ in module.parameters(False)):
            seen.update(map(id, new))
            # A `Select` before a pruned layer wraps it, but the layer keeps its name.
            costs[original_name(net, layer)] = macs.pop(layer, 0), sum(p.numel() for p in new)
    rest = sum(macs.values()), count_parameters(net) - sum(count for _, count in costs.values())
    return costs if rest == (0, 0) else {**costs, "": rest}


def shares_not_prunable(
    net: nn.Module, gates: Gates, example_input: Any
) -> dict[str, tuple[float, float]]:
    """The shares of the parameters and of the MACs of layers that are not prunable.

    Args:
        net, example_input: as for `count_macs`.
        gates: from `find_gates`.

    Returns:
        Two fractions for each name in `gates.not_prunable`. MACs that are counted outside of the
        layer, such as those of products in the module around a parameter, are not included.
    """
    costs = costs_by_layer(net, example_input)
    total = max(sum(macs for macs, _ in costs.values()), 1)
    return {
        name: (gates.shares.get(name, 0.0), costs.get(name, (0, 0))[0] / total)
        for name in gates.not_prunable
    }


@contextmanager
def by_module(net: nn.Module, total: Callable[[], int]) -> Iterator[Counter[str]]:
    """Within the context, attribute the increase of `total` to the modules of a network that is
    called.

    Yields:
        A dict from the name of a module to the increase while it was the innermost running module,
        and from "" to the increase outside of all modules. It is complete after the block.
    """
    found, inside, before = Counter[str](), [""], total()

    def settle() -> None:
        found[inside[-1]] += total() - before - found.total()

    def enter(name: str) -> None:
        settle()
        inside.append(name)

    def leave() -> None:
        settle()
        inside.pop()

    with ExitStack() as hooks:
        for name, module in net.named_modules():
            pre = module.register_forward_pre_hook(lambda *_, n=name: enter(n), prepend=True)
            hooks.callback(pre.remove)
            post = module.register_forward_hook(lambda *_: leave(), always_call=True)
            hooks.callback(post.remove)
        yield found
        settle()


def original_name(net: nn.Module, layer: str) -> str:
    """The name of a layer in the dense network, without the `Select` of pruning: ``fc1`` for
    ``fc1.layer``.
    """
    parent, _, leaf = layer.rpartition(".")
    selects = isinstance(getattr(net.get_submodule(parent), "select", None), Select)
    return parent if leaf == "layer" and selects else layer
