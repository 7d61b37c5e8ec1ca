"""Which rows of a layer form a unit: codes that distinguish classes of rows, and candidates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["bits_of", "codes", "numbers_of", "partitions", "partitions_that_fit"]

#: The number of patterns that are tested first.
_FEW = 8


def bits_of(size: int) -> int:
    """The number of bits that distinguish the numbers of `size` classes."""
    return max(1, (size - 1).bit_length())


def codes(size: int) -> Tensor:
    """The classes that each pass marks, ``[2 * bits, size]``: each bit, then its complement."""
    numbers = torch.arange(size, device="cpu")
    ones = torch.stack([(numbers >> bit) & 1 for bit in range(bits_of(size))]).bool()
    return torch.stack([ones, ~ones], 1).flatten(0, 1)


def numbers_of(bits: Sequence[Tensor]) -> Tensor:
    """The numbers with given bits, int64 ``[columns]``; the lowest bit, bool, comes first."""
    return torch.stack([bit.long() << place for place, bit in enumerate(bits)]).sum(0)


def partitions(rows: int) -> Iterator[Tensor]:
    """Partitions of rows into classes of equal size, those with the most classes first.

    The class of a row is ``(row // block) % classes``. The classes are contiguous blocks (the heads
    of a layer of queries), strides (the halves of a gated linear unit), or repeated blocks (a layer
    of queries, keys and values). If a key and a value serve several queries, a class has a large
    block of the first part of the layer and two small blocks of the rest.

    Args:
        rows: the number of rows.

    Yields:
        The class of each row, ``[rows]``.
    """
    numbers = torch.arange(rows, device="cpu")
    for classes in range(rows // 2, 1, -1):
        if rows % classes == 0:
            for block in range(1, rows // classes + 1):
                if rows // classes % block == 0:
                    yield (numbers // block) % classes
            for block in range(rows // classes // 4, 0, -1):
                if rows // classes % block == 0:
                    queries = rows - 2 * classes * block
                    yield torch.where(
                        numbers < queries,
                        numbers // (queries // classes),
                        (numbers - queries) // block % classes,
                    )


def partitions_that_fit(ones: Tensor, zeros: Tensor, rows: int) -> Iterator[Tensor]:
    """The `partitions` in which every column can be reached by a single class.

    Args:
        ones, zeros: bool ``[bits, columns]``: whether the column is reached by a row whose number
            has a one (or a zero) in that bit.
        rows: the number of rows.
    """
    patterns = torch.cat([ones, zeros]).T.unique(dim=0).float()
    bits = codes(rows)
    row_bits = torch.cat([bits[0::2], bits[1::2]]).float()
    for classes in partitions(rows):
        count = torch.zeros(len(row_bits), int(classes.max()) + 1, device="cpu")
        without_bit = (count.index_add_(1, classes, row_bits) == 0).float()
        # The products count the bits of the rows that reach a column which no row of the class has.
        # A few of the patterns exclude most partitions.
        if all(
            bool(((some @ without_bit) == 0).any(1).all())
            for some in (patterns[:_FEW], patterns[_FEW:])
        ):
            yield classes
