"""Find the row, or the class of rows, of a writer that reaches each column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_sbp.gates.classes import codes, numbers_of, partitions_that_fit
from pyro_sbp.gates.probe import Astray, Probe
from pyro_sbp.gates.reaching import Reach

__all__ = ["decode", "decode_alike", "groups_to_decode"]

#: The largest number of partitions of the rows of a writer that are measured.
_PARTITIONS = 4


def groups_to_decode(reaches: Sequence[Reach], unless_alike: bool = False) -> list[list[Reach]]:
    """Divide writers into sets in which no two writers reach a common column.

    Args:
        reaches: the measurements of the writers.
        unless_alike: whether two writers of a set may reach a common column if they have the same
            number of rows.
    """
    # For each set: its writers, and for each column the number of rows of the writers that reach
    # it, or 0.
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


def decode_alike(probe: Probe, reaches: Sequence[Reach]) -> None:
    """Find the row that reaches each column, if it has the same number in all writers.

    The writers of a residual stream are an example. Their rows with the same bits share a pass. If
    a column sees exactly one of each bit and its complement, all rows that reach it have the same
    number. If this fails for a writer, its measurement gets no columns, and `decode` must be called
    for it. No problem is recorded either, because another writer of the same pass may have caused
    it.
    """
    for together in groups_to_decode(reaches, unless_alike=True):
        decodings = [_Decoding(reach, partial=True) for reach in together]
        _decode_bits(probe, decodings)
        for decoding in decodings:
            decoding.finish()
            decoding.reach.problem = None


def decode(probe: Probe, reaches: Sequence[Reach]) -> None:
    """Find the class that reaches each column, for writers that reach no common column.

    The attributes `classes` and `columns` of the measurements are set, or the attribute `problem`.
    """
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

    Attributes:
        codes: the classes that are marked in each pass, as from `classes.codes`.
        hits: for each bit, the columns that its pass and the pass of its complement reach, by
            layer.
        mixed: a layer in which several classes reach the same column, or "".
        first: if there is such a layer, the columns that the first row reaches, by layer.
    """

    def __init__(self, reach: Reach, partial: bool = False) -> None:
        self.reach, self.partial = reach, partial
        self.codes = codes(reach.size)
        self.hits: list[list[dict[str, Tensor]]] = []
        self.mixed = ""
        self.first: dict[str, Tensor] = {}

    @property
    def unfinished(self) -> bool:
        """Whether more passes are needed."""
        done = 2 * len(self.hits) >= len(self.codes) or (self.partial and bool(self.mixed))
        return not done and self.reach.problem is None

    def rows(self, half: int) -> Tensor:
        """The rows that are set to NaN in the next pass, bool ``[rows]``.

        Args:
            half: 0 for the pass of the next bit, and 1 for the pass of its complement.
        """
        return self.codes[2 * len(self.hits) + half][self.reach.classes]

    def add(self, passes: Sequence[Mapping[str, Tensor]]) -> None:
        """Record the columns that were reached in the passes of a bit and of its complement."""
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
        """Set the class that reaches each column, if no column is reached by several classes."""
        if self.mixed or self.reach.problem is not None:
            return
        for name, seen in self.reach.seen.items():
            number = numbers_of([one[name] for one, _ in self.hits])
            self.reach.columns[name] = torch.where(seen, number, -1)

    def bits(self) -> tuple[Tensor, Tensor]:
        """The arguments `ones` and `zeros` of `partitions_that_fit`, for the columns of all layers
        that the writer reaches."""
        seen = torch.cat([*self.reach.seen.values()])
        ones, zeros = (
            torch.stack([torch.cat([*hits[half].values()])[seen] for hits in self.hits])
            for half in range(2)
        )
        return ones, zeros

    def meeting(self) -> str:
        """The reason why the rows are not units."""
        return f"several of its units reach the same column of {self.mixed!r}"


def _decode_bits(probe: Probe, decodings: Sequence[_Decoding]) -> None:
    """Run the passes that identify the classes of writers. All of them share each pass."""
    while active := [decoding for decoding in decodings if decoding.unfinished]:
        clear = [decoding for decoding in active if not decoding.mixed]
        until = {name for decoding in active for name in decoding.reach.seen}
        passes = []
        for half in range(2):
            chosen = {decoding.reach.writer: decoding.rows(half) for decoding in active}
            try:
                probe.run(chosen, until)
            except Astray as error:
                for decoding in active:
                    decoding.reach.problem = str(error)
            passes.append(probe.seen)
        for decoding in active:
            decoding.add(passes)
        _look_at_first_rows(
            probe, [decoding for decoding in clear if decoding.mixed and not decoding.partial]
        )


def _look_at_first_rows(probe: Probe, decodings: Sequence[_Decoding]) -> None:
    """Record the columns that the first row of each writer reaches.

    If it reaches all columns of a layer that the other rows reach, all rows are in one class. Then
    the rows are not units.
    """
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
    """The possible partitions of the rows of one writer, those with the most classes first.

    Two rows that reach the same column are in the same class. This excludes most partitions.

    Args:
        decoding: the results of the passes in which every row was a class.

    Attributes:
        partitions: the class of each row in each partition, ``[partitions, rows]``.
        likely: the partitions in which, according to the passes so far, no row of another class
            reaches a column of the first row, bool ``[partitions]``.
    """

    def __init__(self, decoding: _Decoding) -> None:
        self.decoding = decoding
        rows = len(decoding.reach.classes)
        found = list(partitions_that_fit(*decoding.bits(), rows))
        self.partitions = torch.stack(found) if found else torch.empty(0, rows, device="cpu")
        self.likely = torch.zeros(len(found), dtype=torch.bool, device="cpu")

    def rows(self) -> Tensor | None:
        """The rows to compare with the first row, bool ``[rows]``.

        Of the partitions before the first likely one, the middle one is taken. The rows are those
        that are not in the class of the first row. A pass with these rows excludes the middle
        partition, or marks it as likely.

        Returns:
            The rows, or None if the first partition is likely.
        """
        likely = torch.nonzero(self.likely).flatten()
        before = int(likely[0]) if len(likely) else len(self.partitions)
        if before == 0:
            return None
        middle = self.partitions[(before - 1) // 2]
        return middle != middle[0]

    def learn(self, rows: Tensor, hits: Mapping[str, Tensor]) -> None:
        """Use the result of a pass: exclude partitions, or mark partitions as likely.

        Args:
            rows: the rows that were set to NaN, from `rows`.
            hits: the columns that were reached, by layer.
        """
        first = self.decoding.first
        others = self.partitions != self.partitions[:, :1]
        if any(bool((hits[name] & first[name]).any()) for name in first if name in hits):
            # One of these rows is in the class of the first row, so partitions are excluded in
            # which none of them is.
            possible = ~others[:, rows].all(1)
            self.partitions, self.likely = self.partitions[possible], self.likely[possible]
        else:
            self.likely |= ~(others & ~rows).any(1)

    def take(self) -> Tensor | None:
        """Remove and return the first partition, or return None if there is none."""
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
    """The columns that some rows of each writer reach, by layer.

    The result is empty if the network fails on NaN in these rows.
    """
    chosen = {reach.writer: mask for reach, mask in rows}
    try:
        probe.run(chosen, {name for reach, _ in rows for name in reach.seen})
    except Astray:
        return {}
    return probe.seen
