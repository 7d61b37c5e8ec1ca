"""Every method on the meta device: a tensor that is made on the CPU by mistake fails there.

Tensors on the meta device have shapes and no values, so a whole run costs nothing, and an operation
on tensors of two devices is refused as on a GPU. Where the code reads values on the host (to choose
units, to compare outputs), made-up ones are returned.
"""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import pyro_sbp as sbp
from pyro_sbp import networks
from pyro_sbp.gates import GatedNetwork, find_gates, fold, shrink
from pyro_sbp.methods.rbp import RBP
from pyro_sbp.methods.sbp import SBP
from pyro_sbp.methods.sparse_vd import SparseVD
from pyro_sbp.recipes import RBPRecipe, SBPRecipe, SparseVDRecipe

META = torch.device("meta")


class ValuesOnTheHost(TorchFunctionMode):
    """Inside, reading the values of a meta tensor on the host gives made-up ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_meta:
            if func in (Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.item):
                return {Tensor.__bool__: False, Tensor.__int__: 1}.get(func, 0.5)
            to_cpu = func is Tensor.to and any(
                isinstance(arg, str | torch.device) and torch.device(arg).type == "cpu"
                for arg in (*args[1:], *kwargs.values())
            )
            if func is Tensor.cpu or to_cpu:
                # Of units in order, some are kept and some are not.
                values = torch.linspace(0.0, 1.0, x.numel()).reshape(x.shape)
                return values > 0.5 if x.dtype == torch.bool else values.to(x.dtype)
            if func is Tensor.tolist:
                return torch.linspace(0.0, 1.0, x.numel()).reshape(x.shape).tolist()
        return func(*args, **kwargs)


def lenet5() -> tuple[nn.Module, tuple[int, ...], tuple[str, ...]]:
    return networks.LeNet5(), (1, 28, 28), ("fc1",)


def resnet() -> tuple[nn.Module, tuple[int, ...], tuple[str, ...]]:
    return networks.ResNetCIFAR(1, width=4), (3, 32, 32), ()


EPOCHS = {"dense_epochs": 1, "epochs": 20, "finetune_epochs": 1, "batch_size": 4, "threshold": 0.5}
METHODS: dict[str, tuple[type, Any]] = {
    "sbp": (SBP, SBPRecipe(macs_weight=1.0, distill=4.0, **EPOCHS)),
    "sbp-example": (SBP, SBPRecipe(noise_per="example", prior_scale=2.0, **EPOCHS)),
    "sbp-cuts": (SBP, SBPRecipe(cut_every=10, **EPOCHS)),
    "rbp": (RBP, RBPRecipe(**EPOCHS)),
    "sparse-vd": (SparseVD, SparseVDRecipe(**EPOCHS)),
    "sparse-vd-exact": (SparseVD, SparseVDRecipe(exact_kl=True, **EPOCHS)),
}


def step(phase: Any, x: Tensor, y: Tensor) -> None:
    """A whole step of training, by an optimizer that knows the meta device."""
    phase.train_mode()
    optimizer = torch.optim.Adam(phase.groups(), fused=False)
    parts = phase.loss(x, y)
    optimizer.zero_grad()
    (parts.nll + parts.kl).backward()
    optimizer.step()
    assert parts.nll.device == META
    devices = {
        p.grad.device for group in phase.groups() for p in group["params"] if p.grad is not None
    }
    assert devices == {META}


@pytest.mark.parametrize("make", [lenet5, pytest.param(resnet, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_its_steps_and_prunes_on_another_device(name, make):
    if make is not lenet5 and name in ("sbp-example", "sparse-vd-exact"):
        pytest.skip("the code is that of the other cases")
    torch.manual_seed(0)
    net, shape, features = make()
    kind, recipe = METHODS[name]
    method = kind(net, torch.randn(8, *shape), recipe, 100, features)  # gates are found on the CPU
    method.example_input = method.example_input.to(META)
    x, y = torch.empty(4, *shape, device=META), torch.empty(4, dtype=torch.long, device=META)
    method.net.to(META)
    names = []
    with pyro.validation_enabled(False), ValuesOnTheHost():
        for phase in method.phases():
            phase.module.to(META)
            step(phase, x, y)
            phase.module.eval()
            assert phase.predictor()(x).device == META
            phase.standing()
            phase.finish()
            names.append(phase.name)
        method.prune(threshold=0.5)
        assert method.small(x).device == META
    assert {tensor.device for tensor in method.small.state_dict().values()} == {META}
    assert names[0] == "dense" and names[-1] == "finetuned" and len(names) > 2


@pytest.mark.parametrize("make", [lenet5, resnet])
def test_noise_is_folded_and_units_are_removed_on_another_device(make):
    net, shape, features = make()
    gates = find_gates(net, torch.randn(2, *shape), features)
    net.to(META)
    x = torch.empty(4, *shape, device=META)
    theta = {gate.name: torch.ones(gate.size, device=META) for gate in gates}
    folded = fold(net, gates, theta)
    assert torch.func.functional_call(net, folded, (x,)).device == META
    each = {name: value.expand(4, -1) for name, value in theta.items()}
    assert GatedNetwork(net, gates)(x, each).device == META
    with ValuesOnTheHost():
        small = shrink(net, gates, theta, x)
    assert sbp.count_macs(small, x) < sbp.count_macs(net, x)
    assert small(x).device == META


def test_tensors_of_two_devices_are_refused():
    """Otherwise the tests above could not fail."""
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3) * torch.ones(3, device=META)
