"""Call a network with NaN in outputs of its layers, and record in which columns NaN appears."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pyro_sbp.errors import first_line
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.flow import OUTPUT, Flow
from pyro_sbp.gates.functions import PROPERTIES, has_nan, tensors_in, unobserved
from pyro_sbp.gates.guards import Guards
from pyro_sbp.gates.layers import channel_dim, is_matrix
from pyro_sbp.gates.loose import LooseTensors
from pyro_sbp.gates.nested import map_tensors, tensors_of
from pyro_sbp.gates.recurrent import first_weight, is_recurrent
from pyro_sbp.gates.replay import Replay
from pyro_sbp.gates.state import State
from pyro_sbp.gates.steady import repeatable
from pyro_sbp.gates.uses import Use, Uses, hidden_of

__all__ = ["Astray", "Probe", "matrices"]


class Astray(Exception):
    """A network raises an error because NaN was put into it."""


class Through(BaseException):
    """A pass has recorded all calls that it needs, and stops.

    It is no `Exception`, so that the code of the network does not catch it.
    """


class Probe(TorchFunctionMode):
    """Observe the layers of a network, recognised by weight or running mean, during its calls.

    A call is a pass. The first pass caches the output of every layer with rows. In later passes,
    each of these layers returns its cached output. NaN that is put into the output of a layer
    therefore stops at the next layers that it reaches.

    Args:
        net: a copy of the network, in float32.
        x: its input in float32, which only this probe uses.

    Attributes:
        used: the ids of all tensors that functions of the first pass have as arguments.
        clean: from each writer to copies of its outputs in the first pass, in order of its calls.
        answers: from each writer to the tensors that the network received as these outputs.
        total: from each layer or product to the number of its calls in the first pass.
        seen: from each layer or product to the columns that have NaN in the current pass, bool.
        trace: if it is a set, the numbers of the function calls whose results have NaN are added.
        flow: if it is set, it follows the functions of the pass.
    """

    def __init__(self, net: nn.Module, x: Any) -> None:
        super().__init__()
        self.net, self.x = net, x
        self.loose = LooseTensors(net)
        self.uses = Uses(net, self.loose)
        self.used: set[int] = set()
        self.clean: dict[str, list[Any]] = {}
        self.answers: dict[str, list[Any]] = {}
        self.replay = Replay()
        self.guards = Guards(self.replay)
        self.state = State(net)
        self.total: Counter[str] = Counter()
        self.trace: set[int] | None = None
        self.flow: Flow | None = None
        #: During `settle`: the names that see NaN in whole rows, and those that see other NaN.
        self.spread: set[str] | None = None
        self.partial: set[str] | None = None
        self.start(None)

    def start(
        self, inject: Mapping[str, Tensor] | None, until: Iterable[str] | None = None
    ) -> None:
        """Start a pass.

        Args:
            inject: from writers to the channels that are set to NaN, bool ``[channels]``. None in
                the first pass.
            until: the layers after whose last calls the pass may stop. None to run the whole
                network.
        """
        self.inject = inject
        self.seen: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()
        self.number = 0
        self.loose.start()
        self.awaited = None if until is None else set(until)
        self.guards.start(inject is None)
        self.replay.start(inject is None, self.loose.filled)

    @property
    def course(self) -> tuple[dict[str, int], int]:
        """The numbers of calls of each layer, and of other functions, in the last pass."""
        return dict(self.calls), self.number

    @property
    def uncalled(self) -> list[str]:
        """The layers that could be writers, but whose weights were not used in the first pass.

        Layers in an `nn.MultiheadAttention` and those that compute their weights are not included.
        """
        names = []
        for name in matrices(self.net):
            module = self.net.get_submodule(name)
            weight = (
                first_weight(module) if is_recurrent(module) else module._parameters.get("weight")
            )
            parent = self.net.get_submodule(name.rpartition(".")[0])
            inside = isinstance(parent, nn.MultiheadAttention)
            if weight is not None and id(weight) not in self.used and not inside:
                names.append(name)
        return names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = self.inject is None
        if func in PROPERTIES:
            if first:
                self.used.update(map(id, tensors_in(args)))
            with unobserved():
                return func(*args, **kwargs)
        with unobserved():
            if first:
                self.used.update(map(id, tensors_in((*args, *kwargs.values()))))
            use = self.uses.of(func, args, kwargs, record=first)
            if use is not None:
                index = self._look(use)
        if use is None:
            out = self.guards(func, args, kwargs)
            with unobserved():
                self.loose.watch(func, args, kwargs, out)
                if self.flow is not None:
                    self.flow.follow(func, args, kwargs, out)
                self.number += 1
                if self.trace is not None and isinstance(out, Tensor) and has_nan(out):
                    self.trace.add(self.number)
            return out
        if first or not use.writes:
            out = self.replay(func, args, kwargs)
            if self.flow is not None:
                with unobserved():
                    self.flow.follow(func, args, kwargs, out)
            if first and use.writes:
                with unobserved():
                    self.clean.setdefault(use.name, []).append(map_tensors(torch.clone, out))
                self.answers.setdefault(use.name, []).append(out)
            return out
        with unobserved():
            out = self._answer(use, index)
            if self.flow is not None:
                self._write(self.flow, use, out)
            return out

    def _look(self, use: Use) -> int:
        """Record which columns of a layer have NaN.

        Returns:
            The number of earlier calls of the layer in this pass.

        Raises:
            Through: it was the last call for which the pass waits.
        """
        index = self.calls[use.name]
        self.calls[use.name] += 1
        for name, x, dim in use.sees:
            if self.flow is not None:
                self.flow.reach(name, [x])
            # A sum is NaN if one of its terms is NaN. Unlike `isnan` of all elements, it needs no
            # memory of the size of the tensor.
            rest = [d for d in range(x.ndim) if d != dim]
            self._see(name, (x.sum(rest) if rest else x).isnan())
            if self.spread is not None and self.partial is not None:
                if _is_spread(x, dim):
                    self.spread.add(name)
                elif bool(self.seen[name].any()):
                    self.partial.add(name)
        if use.weight is not None:
            self._see_weight(use, use.weight)
        if self.inject is None:
            self.total[use.name] += 1
        elif self.awaited is not None and self.calls[use.name] == self.total[use.name]:
            self.awaited -= {use.name, hidden_of(use.name)}
            if not self.awaited:
                raise Through
        return index

    def _see(self, name: str, hit: Tensor) -> None:
        self.seen[name] = self.seen[name] | hit if name in self.seen else hit

    def _see_weight(self, use: Use, weight: Tensor) -> None:
        """Record the columns of NaN in a weight that is computed from several tensors."""
        self.loose.meet(weight, (x for _, x, _ in use.sees))
        columns = _whole_slices(weight, use.weight_dims[1])
        if use.writes and bool(columns.any()):
            self._see(use.name, columns.repeat(self.uses.layouts[use.name].groups))

    def _write(self, flow: Flow, use: Use, out: Any) -> None:
        """Record the output of a writer, and what NaN in the output is combined with in the writer:
        the bias, a computed weight, and the columns of hidden units."""
        flow.write(use.name, out)
        outputs = list(tensors_in([out]))
        for tensor in (use.bias, use.weight):
            if tensor is not None:
                self.loose.meet(tensor, outputs)
        hidden = hidden_of(use.name)
        if hidden in self.uses.layouts:
            flow.reach(hidden, outputs)

    def _answer(self, use: Use, index: int) -> Any:
        """The output of a layer in the first pass, with NaN in the channels that are set to NaN.

        Args:
            use: the call.
            index: the number of earlier calls of the layer in this pass.
        """
        assert self.inject is not None
        rows = torch.zeros(0, dtype=torch.bool, device="cpu")
        if use.weight is not None:
            rows = _whole_slices(use.weight, use.weight_dims[0])
        if use.name not in self.inject and use.bias is None and not bool(rows.any()):
            # It must be the same object, because `Replay` recognises tensors by identity.
            return self.answers[use.name][index]
        out = map_tensors(torch.clone, self.clean[use.name][index])
        if use.bias is not None:
            assert use.out_dim is not None
            out = out + 0 * use.bias.view(*use.bias.shape, *(1,) * (-use.out_dim - 1))
        if bool(rows.any()):
            assert use.out_dim is not None
            out.movedim(use.out_dim, 0)[rows] = torch.nan
        if use.name in self.inject:
            chosen, layer = self.inject[use.name], self.uses.module(use.name)
            for tensor in tensors_of(out):
                dim = use.out_dim
                if dim is None:
                    assert layer is not None
                    dim = channel_dim(layer, tensor)
                channels = tensor.movedim(dim, 0)
                # Both directions of a recurrent layer have the same units.
                channels[chosen.repeat(len(channels) // len(chosen))] = torch.nan
                for computed in (use.bias, use.weight):
                    if computed is not None:
                        self.loose.meet(computed, [tensor])
            hidden = hidden_of(use.name)
            if hidden in self.uses.layouts:
                self._see(hidden, chosen)
        return out

    def _is_parameter(self, name: str) -> bool:
        """Whether the weight of a product is a parameter, and not a buffer."""
        layer, leaf = self.uses.products[name]
        return leaf in self.net.get_submodule(layer)._parameters

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A context for the call of the network in a pass. Afterwards, its state is restored."""
        try:
            with torch.no_grad(), repeatable(torch.float32), self:
                yield
        finally:
            self.replay.finish()
            self.state.restore()

    def run(self, inject: Mapping[str, Tensor], until: Iterable[str] | None = None) -> bool:
        """Call the network once with NaN in some channels.

        Args:
            inject, until: as for `start`.

        Returns:
            Whether NaN reaches an output of the network. It is False if the pass stops earlier.

        Raises:
            Astray: the network raises an error.
        """
        self.start(inject, until)
        try:
            # The fused kernels of attention do not propagate NaN.
            with self.watching(), sdpa_kernel(SDPBackend.MATH):
                output = call(self.net, self.x)
        except Through:
            return False
        except Exception as error:  # a network's own code may raise anything
            raise Astray(f"the network fails on NaN in it: {first_line(error)}") from error
        outputs = list(tensors_of(output))
        if self.flow is not None:
            self.flow.reach(OUTPUT, outputs)
        return any(map(has_nan, outputs))

    def settle(self) -> None:
        """Decide which products act as layers, and name them. It is called after the first pass.

        In the other products, the columns are positions and not channels. Then NaN in one channel
        of a writer fills whole rows of the input of the product (all its columns), and goes on to
        the same channel of the output.
        """
        for name in set(self.clean) - set(self.uses.layouts):
            del self.clean[name], self.answers[name]
        accepted: set[str] = set()
        while open_ := [name for name in self.uses.products if name not in accepted]:
            self.spread, self.partial = set(), set()
            inject = {
                name: torch.arange(self.uses.layouts[name].size, device="cpu") == 0
                for name in self.clean
                if name not in open_
            }
            with contextlib.suppress(Astray):
                self.run(inject)
            like_layers = (self.partial - self.spread) & set(open_)
            forgotten = self.spread & set(open_)
            if not like_layers and not forgotten:
                # Only the input of the network, or other products, reach the remaining products.
                trained = (name for name in open_ if self._is_parameter(name))
                first = next(trained, None)
                forgotten = set(open_) if first is None else set()
                like_layers = set() if first is None else {first}
            accepted |= like_layers
            for name in forgotten:
                self.uses.forget(name)
                del self.clean[name], self.answers[name]
        self.spread = self.partial = None
        short = self.uses.shorten()
        self.clean = {short.get(name, name): answers for name, answers in self.clean.items()}
        self.answers = {short.get(name, name): given for name, given in self.answers.items()}
        self.total = Counter({short.get(name, name): n for name, n in self.total.items()})


def _whole_slices(weight: Tensor, dim: int) -> Tensor:
    """The indices along a dimension at which all elements of a weight are NaN, bool."""
    return weight.isnan().movedim(dim, 0).flatten(1).all(1)


def _is_spread(x: Tensor, dim: int) -> bool:
    """Whether NaN fills whole slices along a dimension, but not the whole tensor."""
    there = x.isnan()
    return bool(there.any() and not there.all() and torch.equal(there.any(dim), there.all(dim)))


def matrices(net: nn.Module) -> list[str]:
    """The names of the layers of a network that can be writers (see `is_matrix`)."""
    return [name for name, module in net.named_modules() if is_matrix(module)]
