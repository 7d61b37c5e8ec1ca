"""Classes of rows that form a unit: the codes of classes, and partitions of rows into classes."""

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
    """The classes that are marked in each pass, bool ``[2 * bits, size]``.

    For each bit of the class number, from the lowest, there are two passes. The first marks the
    classes with a one in this bit, and the second marks the others.
    """
    numbers = torch.arange(size, device="cpu")
    ones = torch.stack([(numbers >> bit) & 1 for bit in range(bits_of(size))]).bool()
    return torch.stack([ones, ~ones], 1).flatten(0, 1)


def numbers_of(bits: Sequence[Tensor]) -> Tensor:
    """The numbers with given bits.

    Args:
        bits: for each bit, from the lowest, its values, bool ``[columns]``.

    Returns:
        The numbers, int64 ``[columns]``.
    """
    return torch.stack([bit.long() << place for place, bit in enumerate(bits)]).sum(0)


def partitions(rows: int) -> Iterator[Tensor]:
    """Partitions of rows into classes of equal size, those with the most classes first.

    There are two forms of partitions. In the first, the class of a row is
    ``(row // block) % classes``: a class is a contiguous block (a head of a layer of queries), the
    rows at a fixed distance (one row of each half of a gated linear unit), or several blocks at a
    fixed distance (a layer of queries, keys and values). The second form is for layers in which
    several heads of queries share keys and values. A class has a large block in the first part of
    the layer, which computes the queries, and a small block in the part of the keys and in that of
    the values.

    Args:
        rows: the number of rows.

    Yields:
        The class of each row, int64 ``[rows]``.
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

    Yields:
        The class of each row, int64 ``[rows]``.
    """
    patterns = torch.cat([ones, zeros]).T.unique(dim=0).float()
    bits = codes(rows)
    row_bits = torch.cat([bits[0::2], bits[1::2]]).float()
    for classes in partitions(rows):
        count = torch.zeros(len(row_bits), int(classes.max()) + 1, device="cpu")
        without_bit = (count.index_add_(1, classes, row_bits) == 0).float()
        # The matrix product counts the marks of a column that no row of a class has. A class can
        # reach the column alone only if there are none. The first few patterns exclude most
        # partitions.
        if all(
            bool(((some @ without_bit) == 0).any(1).all())
            for some in (patterns[:_FEW], patterns[_FEW:])
        ):
            yield classes
