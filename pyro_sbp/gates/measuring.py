"""Measure which columns of the layers of a network each row of a layer reaches.

If an output channel of a layer (a writer) is set to NaN, NaN appears in exactly those input columns
of other layers (the readers) that the channel reaches. This works for any code of the network:
flatten, concatenation, pooling or sums. The numbers of the channels are coded in bits, so that
2 log2(channels) passes distinguish all channels of a writer. If a column sees exactly one of each
bit and its complement, a single channel reaches it, and the bits are its number. If several
channels reach a column, classes of channels replace the channels: the heads of attention, the
halves of a gated linear unit, the groups of a group norm.

Writers share passes. In the pass that sets all channels to NaN, these are writers whose values
cannot reach the same layer. In the coded passes, they are writers that reach no common column, or
have equally many channels.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pyro_sbp.errors import first_line
from pyro_sbp.gates.classes import bits_of, codes, numbers_of, partitions_that_fit
from pyro_sbp.gates.flow import OUTPUT, Flow, apart
from pyro_sbp.gates.folding import call
from pyro_sbp.gates.functions import PROPERTIES, has_nan, tensors_in, unobserved
from pyro_sbp.gates.guards import Guards
from pyro_sbp.gates.layers import channel_dim, is_matrix
from pyro_sbp.gates.loose import (
    Follower,
    LooseTensors,
    Met,
    Place,
    Slices,
    decode,
    slices_to_try,
)
from pyro_sbp.gates.nested import map_tensors, tensors_of
from pyro_sbp.gates.recurrent import first_weight, is_recurrent
from pyro_sbp.gates.replay import Replay
from pyro_sbp.gates.state import State
from pyro_sbp.gates.steady import repeatable
from pyro_sbp.gates.uses import Use, Uses, hidden_of

__all__ = ["Probe", "Reach", "follow", "matrices", "measure"]

#: The largest number of partitions of the rows of a writer that are measured.
_PARTITIONS = 4
_UNREAD = "no layer reads it"


class _Astray(Exception):
    """NaN changes the control flow of the network: other layers are called, or an error occurs."""


class _Through(BaseException):
    """A pass has seen all calls that it needs, and can stop."""


class Probe(TorchFunctionMode):
    """Observe the layers of a network, recognised by weight or running mean, during its calls.

    The first call caches the output of every layer with rows. In later calls, each of these layers
    returns its cached output. A NaN that is put into the output of a layer therefore stops at the
    next layers that it reaches.

    Args:
        net: a copy of the network, in float32.
        x: its input in float32, which only this probe uses.
    """

    def __init__(self, net: nn.Module, x: Any) -> None:
        super().__init__()
        self.net, self.x = net, x
        self.loose = LooseTensors(net)
        self.uses = Uses(net, self.loose)
        self.used: set[int] = set()
        self.clean: dict[str, list[Any]] = {}
        self.answers: dict[str, list[Any]] = {}  # the tensors that the network received
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
            inject: from writers to the channels that are set to NaN; None in the first pass.
            until: the layers after whose calls the pass may stop; None to run the whole network.
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
    def uncalled(self) -> list[str]:
        """The layers whose weights were not used in the first pass."""
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
        """Record which columns of a layer see NaN. Return the number of its earlier calls.

        Raises:
            _Through: it was the last call that the pass awaits.
        """
        index = self.calls[use.name]
        self.calls[use.name] += 1
        for name, x, dim in use.sees:
            if self.flow is not None:
                self.flow.reach(name, [x])
            # A sum is NaN if one of its terms is NaN. It needs no copy of the tensor.
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
                raise _Through
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
        """Record the output of a writer, and what its own injection reaches."""
        flow.write(use.name, out)
        outputs = list(tensors_in([out]))
        for tensor in (use.bias, use.weight):
            if tensor is not None:
                self.loose.meet(tensor, outputs)
        hidden = hidden_of(use.name)
        if hidden in self.uses.layouts:
            flow.reach(hidden, outputs)

    def _answer(self, use: Use, index: int) -> Any:
        """The output of a layer in the first pass, with NaN in some channels."""
        assert self.inject is not None
        rows = torch.zeros(0, dtype=torch.bool, device="cpu")
        if use.weight is not None:
            rows = _whole_slices(use.weight, use.weight_dims[0])
        if use.name not in self.inject and use.bias is None and not bool(rows.any()):
            # The same object, which `Replay` recognises.
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
        layer, leaf = self.uses.products[name]
        return leaf in self.net.get_submodule(layer)._parameters

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which a call of the network on the input of the probe is a pass."""
        try:
            with torch.no_grad(), repeatable(torch.float32), self:
                yield
        finally:
            self.replay.finish()
            self.state.restore()

    def settle(self) -> None:
        """After the first pass, decide which products act as layers, and name them.

        In other products the columns are positions and not channels: NaN in one channel of a writer
        appears in all columns of some rows of the input, and passes on to the same channel.
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
            with contextlib.suppress(_Astray):
                _pass(self, inject)
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


@dataclass
class Reach:
    """The measurement of one writer: which columns its rows reach.

    Attributes:
        writer: the name of the layer.
        classes: the class of each row, ``[rows]``. At first every row is a class. If several rows
            reach the same column, rows that belong together form a class.
        seen: from a layer to the columns that any row reaches.
        columns: from a layer to the class that reaches each column, or -1.
        beside: if no layer reads the rows, the writer to whose rows they are added. Both writers
            are cut together.
        met: the places of the tensors that belong to no known layer and that the rows meet.
        problem: the reason why the rows are not units, or None.
    """

    writer: str
    classes: Tensor
    seen: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    beside: str | None = None
    met: set[tuple[str, str]] = field(default_factory=set)
    problem: str | None = None

    @property
    def size(self) -> int:
        """The number of classes."""
        return int(self.classes.max()) + 1


def _pass(
    probe: Probe,
    inject: Mapping[str, Tensor],
    until: Iterable[str] | None = None,
) -> bool:
    """Call the network once with NaN in some channels.

    Returns:
        Whether NaN reaches an output of the network.

    Raises:
        _Astray: the network fails on NaN.
    """
    probe.start(inject, until)
    try:
        # The fused kernels of attention do not propagate NaN.
        with probe.watching(), sdpa_kernel(SDPBackend.MATH):
            output = call(probe.net, probe.x)
    except _Through:
        return False
    except Exception as error:  # a network's own code may raise anything
        raise _Astray(f"the network fails on NaN in it: {first_line(error)}") from error
    outputs = list(tensors_of(output))
    if probe.flow is not None:
        probe.flow.reach(OUTPUT, outputs)
    return any(map(has_nan, outputs))


def matrices(net: nn.Module) -> list[str]:
    """The names of the layers that can be writers."""
    return [name for name, module in net.named_modules() if is_matrix(module)]


def measure(probe: Probe, writers: Sequence[str]) -> list[Reach]:
    """Measure which columns the rows of all writers reach.

    Args:
        probe: the probe of the network, after its first pass.
        writers: the names of the layers that produce units.
    """
    layouts = probe.uses.layouts
    reaches = {
        writer: Reach(writer, torch.arange(layouts[writer].size, device="cpu"))
        for writer in writers
    }
    _measure_reach(probe, reaches)
    _join_unread(probe, list(reaches.values()))
    _decode_alike(probe, [reach for reach in reaches.values() if reach.problem is None])
    unknown = [r for r in reaches.values() if r.problem is None and not r.columns]
    for together in _apart(unknown):
        _decode(probe, together)
    problems = {reach.writer: reach.problem for reach in reaches.values()}
    for reach in reaches.values():
        if reach.beside is not None and problems[reach.beside] is not None:
            reach.problem = _UNREAD
    return list(reaches.values())


def _measure_reach(probe: Probe, reaches: Mapping[str, Reach]) -> None:
    """Measure which columns any row of each writer reaches.

    Writers whose values cannot reach the same layer share a pass.
    """
    probe.flow = probe.loose.meetings = flow = Flow()
    try:
        _pass(probe, {})
        bounds = {writer: flow.reached_by(writer) for writer in reaches}
    except _Astray:
        bounds = {}
    finally:
        probe.flow = probe.loose.meetings = None
    for writers in apart(bounds) if bounds else [[writer] for writer in reaches]:
        members = [reaches[writer] for writer in writers]
        together = len(members) > 1
        if not together or not _reach_of(probe, members, bounds):
            for member in members:
                _reach_of(probe, [member], {})


def _reach_of(
    probe: Probe, reaches: Sequence[Reach], bounds: Mapping[str, set[str | Place]]
) -> bool:
    """Measure which columns any row of some writers reaches, in one pass.

    Args:
        probe: the probe.
        reaches: the writers.
        bounds: what each of several writers may reach.

    Returns:
        False if it cannot be decided which of several writers reaches a column.
    """
    inject = {
        reach.writer: torch.ones(len(reach.classes), dtype=torch.bool, device="cpu")
        for reach in reaches
    }
    probe.loose.meetings = met = Met()
    try:
        hits_output = _pass(probe, inject)
    except _Astray as error:
        if len(reaches) > 1:
            return False
        reaches[0].problem = str(error)
        return True
    finally:
        probe.loose.meetings = None
    hits = {name: hit for name, hit in probe.seen.items() if bool(hit.any())}
    found: set[str | Place] = {*hits, *met.places, *([OUTPUT] if hits_output else [])}
    if len(reaches) > 1 and not found <= set().union(*(bounds[r.writer] for r in reaches)):
        return False
    for reach in reaches:
        mine = bounds.get(reach.writer, found)
        if OUTPUT in found & mine:
            reach.problem = "reaches an output of the network"
            continue
        reach.seen = {name: hit for name, hit in hits.items() if name in mine}
        reach.met = met.places & mine
        own, layouts = hidden_of(reach.writer), probe.uses.layouts
        if not any(layouts[name].role == "reader" for name in reach.seen if name != own):
            reach.problem = _UNREAD
    return True


def _join_unread(probe: Probe, reaches: Sequence[Reach]) -> None:
    """For writers that no layer reads, find the residual stream to which they are added.

    An example is the last layer of a residual stack of which only earlier sums are used. The values
    of such a layer do not matter, but it must have as many rows as the stream, in any order.
    """
    unread = [reach for reach in reaches if reach.problem == _UNREAD]
    others = [reach for reach in reaches if reach.problem is None]
    for reach in unread:
        reached = _trace(probe, reach)
        meeting = [
            (min(common), other.writer)
            for other in others
            if len(other.classes) == len(reach.classes)
            and (common := reached & _trace(probe, other))
        ]
        if meeting:
            reach.problem, reach.beside = None, min(meeting)[1]


def _trace(probe: Probe, reach: Reach) -> set[int]:
    """The numbers of the function calls, in order, whose results have NaN from a writer."""
    probe.trace = set()
    try:
        _pass(probe, {reach.writer: torch.ones_like(reach.classes, dtype=torch.bool)})
        return probe.trace
    finally:
        probe.trace = None


def follow(probe: Probe, groups: Sequence[Sequence[Reach]]) -> list[list[Follower]]:
    """Find the tensors that belong to no known layer and have slices for the units of writers.

    Args:
        probe: the probe of the network, after its first pass.
        groups: groups of writers. Different groups reach no common column, so tensors that meet
            different groups share passes.

    Returns:
        The followers of each group.
    """
    weights = set(probe.uses.products.values())
    met = [set().union(*(reach.met for reach in group)) - weights for group in groups]
    pending = [
        (slices, [n for n, here in enumerate(met) if any(p in here for p in slices.places)])
        for slices in slices_to_try(probe.loose, set().union(*met))
    ]
    columns = [_columns_of(group) for group in groups]
    found: list[list[Follower]] = [[] for _ in groups]
    while pending:
        chosen: list[tuple[Slices, list[int]]] = []
        for item in pending:
            if not any(set(item[1]) & set(others) for _, others in chosen):
                chosen.append(item)
        pending = [item for item in pending if item not in chosen]
        passes = _passes_of(probe, [slices for slices, _ in chosen], set().union(*columns))
        for slices, numbers in chosen:
            here = [columns[number] for number in numbers]
            follower = decode(slices, passes[: 2 * bits_of(slices.size)], _merged(here))
            if follower is not None:
                for number in numbers:
                    found[number].append(follower)
            elif len(slices.tensors) > 1:
                pending += [(single, numbers) for single in slices.singly()]
            else:
                sizes = {reach.size for number in numbers for reach in groups[number]}
                pending += [(blocks, numbers) for blocks in slices.in_blocks(sorted(sizes))]
    return found


def _columns_of(group: Sequence[Reach]) -> dict[str, Tensor]:
    """The columns of layers that the units of a group reach, bool."""
    return _merged([{n: c >= 0 for n, c in reach.columns.items()} for reach in group])


def _merged(columns: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for one in columns:
        for name, here in one.items():
            merged[name] = merged[name] | here if name in merged else here
    return merged


def _passes_of(
    probe: Probe, all_slices: Sequence[Slices], until: set[str]
) -> list[dict[str, Tensor]]:
    """The columns that slices reach, in a pass for each bit of their numbers and its complement."""
    passes = []
    for index in range(2 * max(bits_of(slices.size) for slices in all_slices)):
        for slices in all_slices:
            if index < 2 * bits_of(slices.size):
                probe.loose.fill(slices, codes(slices.size)[index])
        try:
            _pass(probe, {}, until)
            passes.append(probe.seen)
        except _Astray:
            passes.append({})
        finally:
            probe.loose.restore()
    return passes


def _apart(reaches: Sequence[Reach], unless_alike: bool = False) -> list[list[Reach]]:
    """Divide writers into sets in which no two writers reach a common column.

    Args:
        reaches: the measurements of the writers.
        unless_alike: whether writers with the same number of rows may reach a common column.
    """
    # For each column, the number of rows of the writers that reach it, or 0.
    sets: list[tuple[list[Reach], dict[str, Tensor]]] = []
    for reach in reaches:
        allowed = {0, reach.size} if unless_alike else {0}
        for chosen in sets:
            meets = (chosen[1][name][hit] for name, hit in reach.seen.items() if name in chosen[1])
            if all(allowed.issuperset(sizes.unique().tolist()) for sizes in meets):
                break
        else:
            chosen = ([], {})
            sets.append(chosen)
        members, taken = chosen
        members.append(reach)
        for name, hit in reach.seen.items():
            taken[name] = torch.where(hit, reach.size, taken.get(name, 0))
    return [members for members, _ in sets]


def _decode_alike(probe: Probe, reaches: Sequence[Reach]) -> None:
    """Find the row that reaches each column, if it has the same number in all writers.

    The writers of a residual stream are an example. Their rows with the same bits share a pass. If
    a column sees exactly one of each bit and its complement, only rows of one number reach it,
    whatever their writer. Other writers are left for `_decode`.
    """
    for together in _apart(reaches, unless_alike=True):
        decodings = [_Decoding(reach, partial=True) for reach in together]
        _decode_bits(probe, decodings)
        for decoding in decodings:
            decoding.finish()


def _decode(probe: Probe, reaches: Sequence[Reach]) -> None:
    """Find the class that reaches each column, for writers that reach no common column."""
    decodings = [_Decoding(reach) for reach in reaches]
    _decode_bits(probe, decodings)
    for decoding in decodings:
        decoding.finish()
    mixed = [
        decoding for decoding in decodings if decoding.mixed and decoding.reach.problem is None
    ]
    trying = [_Guesses(decoding) for decoding in mixed]
    for _ in range(_PARTITIONS):
        _compare_rows(probe, trying)
        decodings = []
        for guesses in trying:
            classes = guesses.take()
            if classes is not None:
                guesses.decoding.reach.classes = classes
                decodings.append(_Decoding(guesses.decoding.reach, partial=True))
        _decode_bits(probe, decodings)
        for decoding in decodings:
            decoding.finish()
        failed = {
            decoding.reach.writer
            for decoding in decodings
            if decoding.mixed and not decoding.reach.problem
        }
        trying = [guesses for guesses in trying if guesses.decoding.reach.writer in failed]
    for decoding in mixed:
        if not decoding.reach.columns and decoding.reach.problem is None:
            decoding.reach.problem = decoding.meeting()


class _Decoding:
    """The results of the passes that identify the classes of one writer.

    Args:
        reach: the measurement of the writer.
        partial: whether to stop if several classes reach the same column.
    """

    def __init__(self, reach: Reach, partial: bool = False) -> None:
        self.reach, self.partial = reach, partial
        self.codes = codes(reach.size)
        self.hits: list[
            list[dict[str, Tensor]]
        ] = []  # for each bit and its complement, from layer to columns
        self.mixed = ""  # a layer in which several classes reach the same column
        self.first: dict[
            str, Tensor
        ] = {}  # the columns that the first row reaches, if there is such a layer

    @property
    def unfinished(self) -> bool:
        done = 2 * len(self.hits) >= len(self.codes) or (self.partial and bool(self.mixed))
        return not done and self.reach.problem is None

    def rows(self, half: int) -> Tensor:
        """The rows that are set to NaN in the next pass."""
        return self.codes[2 * len(self.hits) + half][self.reach.classes]

    def add(self, passes: Sequence[Mapping[str, Tensor]]) -> None:
        """Record the columns that the passes of a bit and of its complement have reached."""
        self.hits.append([{}, {}])
        for name, seen in self.reach.seen.items():
            if name not in passes[0] or name not in passes[1]:
                self.reach.problem = f"layer {name!r} is not called every time"
                return
            one, zero = passes[0][name] & seen, passes[1][name] & seen
            if not torch.equal(one | zero, seen):
                self.reach.problem = f"what reaches {name!r} depends on the data"
                return
            if not self.mixed and bool((one & zero).any()):
                self.mixed = name
            self.hits[-1][0][name], self.hits[-1][1][name] = one, zero

    def finish(self) -> None:
        """Set the class that reaches each column, if it is a single class."""
        if self.mixed or self.reach.problem is not None:
            return
        for name, seen in self.reach.seen.items():
            number = numbers_of([one[name] for one, _ in self.hits])
            self.reach.columns[name] = torch.where(seen, number, -1)

    def bits(self) -> tuple[Tensor, Tensor]:
        """Whether ones and whether zeros of each bit reach each column, ``[bits, columns]``."""
        seen = torch.cat([*self.reach.seen.values()])
        ones, zeros = (
            torch.stack([torch.cat([*hits[half].values()])[seen] for hits in self.hits])
            for half in range(2)
        )
        return ones, zeros

    def meeting(self) -> str:
        return f"several of its units reach the same column of {self.mixed!r}"


def _decode_bits(probe: Probe, decodings: Sequence[_Decoding]) -> None:
    """Run the passes that identify the classes of writers that reach no common column."""
    while active := [decoding for decoding in decodings if decoding.unfinished]:
        clear = [decoding for decoding in active if not decoding.mixed]
        until = {name for decoding in active for name in decoding.reach.seen}
        passes = []
        for half in range(2):
            chosen = {decoding.reach.writer: decoding.rows(half) for decoding in active}
            try:
                _pass(probe, chosen, until)
            except _Astray as error:
                for decoding in active:
                    decoding.reach.problem = str(error)
            passes.append(probe.seen)
        for decoding in active:
            decoding.add(passes)
        _look_at_first_rows(
            probe, [decoding for decoding in clear if decoding.mixed and not decoding.partial]
        )


def _look_at_first_rows(probe: Probe, decodings: Sequence[_Decoding]) -> None:
    """Record the columns that the first row reaches: all of a layer, if there are no classes."""
    if not decodings:
        return
    first_rows = [
        (d.reach, torch.arange(len(d.reach.classes), device="cpu") == 0) for d in decodings
    ]
    hits = _reached(probe, first_rows)
    for decoding in decodings:
        for name, seen in decoding.reach.seen.items():
            decoding.first[name] = hits[name] & seen if name in hits else ~seen & seen
            if int(seen.sum()) > 1 and torch.equal(decoding.first[name], seen):
                decoding.reach.problem = decoding.meeting()


class _Guesses:
    """The partitions of the rows of one writer that are possible, most classes first.

    Two rows that reach the same column are in the same class. This excludes most partitions.

    Args:
        decoding: the results of the passes in which every row was a class.
    """

    def __init__(self, decoding: _Decoding) -> None:
        self.decoding = decoding
        rows = len(decoding.reach.classes)
        found = list(partitions_that_fit(*decoding.bits(), rows))
        self.partitions = torch.stack(found) if found else torch.empty(0, rows, device="cpu")
        #: The partitions in which no row of another class reaches a column of the first row.
        self.likely = torch.zeros(len(found), dtype=torch.bool, device="cpu")

    def rows(self) -> Tensor | None:
        """The rows to compare with the first one, bool; None if the first partition is likely.

        These are the rows of other classes in the middle one of the partitions before the first
        likely one. A pass excludes it, and all partitions with smaller classes, or makes it likely.
        """
        likely = torch.nonzero(self.likely).flatten()
        before = int(likely[0]) if len(likely) else len(self.partitions)
        if before == 0:
            return None
        middle = self.partitions[(before - 1) // 2]
        return middle != middle[0]

    def learn(self, rows: Tensor, hits: Mapping[str, Tensor]) -> None:
        """Exclude partitions that contradict the columns that rows reach."""
        first = self.decoding.first
        others = self.partitions != self.partitions[:, :1]
        if any(bool((hits[name] & first[name]).any()) for name in first if name in hits):
            # One of the rows is in the class of the first row.
            possible = ~others[:, rows].all(1)
            self.partitions, self.likely = self.partitions[possible], self.likely[possible]
        else:
            self.likely |= ~(others & ~rows).any(1)

    def take(self) -> Tensor | None:
        """Remove the first partition, and return it."""
        if not len(self.partitions):
            return None
        first = self.partitions[0]
        self.partitions, self.likely = self.partitions[1:], self.likely[1:]
        return first


def _compare_rows(probe: Probe, trying: Sequence[_Guesses]) -> None:
    """Exclude partitions by passes with some rows, until the first partition is likely."""
    while rows := [(g, chosen) for g in trying if (chosen := g.rows()) is not None]:
        hits = _reached(probe, [(guesses.decoding.reach, chosen) for guesses, chosen in rows])
        for guesses, chosen in rows:
            guesses.learn(chosen, hits)


def _reached(probe: Probe, rows: Sequence[tuple[Reach, Tensor]]) -> dict[str, Tensor]:
    """The columns that some rows of each writer reach."""
    chosen = {reach.writer: mask for reach, mask in rows}
    try:
        _pass(probe, chosen, {name for reach, _ in rows for name in reach.seen})
    except _Astray:
        return {}
    return probe.seen
