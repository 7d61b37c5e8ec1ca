"""Measure which columns of the layers of a network each row of a layer reaches.

If an output channel of a layer (a writer) is set to NaN, NaN appears in exactly those input columns
of other layers (the readers) that the channel reaches. This works for any code of the network that
propagates NaN, such as flatten, concatenation, pooling or sums. The numbers of the channels are
coded in bits, so that 2 log2(channels) passes distinguish all channels of a writer. In one pass,
the channels with a one in a bit are set to NaN, and in another pass (of the complement) the
channels with a zero. If a column sees NaN in exactly one of the two passes of each bit, a single
channel reaches it, and the bits are its number. If several channels reach a column, classes of
channels are measured instead of channels: the heads of attention, pairs of channels from the halves
of a gated linear unit, the groups of a group norm.

Several writers share a pass. A pass that sets all channels to NaN is shared by writers whose values
cannot reach the same layer. A coded pass is shared by writers that reach no common column, or that
have the same number of channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyro_sbp.gates.decoding import decode, decode_alike, groups_to_decode
from pyro_sbp.gates.probe import Probe
from pyro_sbp.gates.reaching import UNREAD, Reach, join_unread, measure_reach

__all__ = ["measure"]


def measure(probe: Probe, writers: Sequence[str]) -> list[Reach]:
    """Measure which columns the rows of all writers reach.

    Args:
        probe: the probe of the network, after its first pass.
        writers: the names of the layers that produce units.

    Returns:
        The measurement of each writer, in the same order.
    """
    layouts = probe.uses.layouts
    reaches = {
        writer: Reach(writer, torch.arange(layouts[writer].size, device="cpu"))
        for writer in writers
    }
    measure_reach(probe, reaches)
    join_unread(probe, list(reaches.values()))
    reading = [reach for reach in reaches.values() if reach.problem is None and reach.seen]
    decode_alike(probe, reading)
    for together in groups_to_decode([reach for reach in reading if not reach.columns]):
        decode(probe, together)
    problems = {reach.writer: reach.problem for reach in reaches.values()}
    for reach in reaches.values():
        if reach.beside is not None and problems[reach.beside] is not None:
            reach.problem = UNREAD
    return list(reaches.values())
