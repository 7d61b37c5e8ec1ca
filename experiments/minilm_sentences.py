"""The sentences of SST-2 in batches, for the training of MiniLM."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batches", "load_sentences"]


class Batches:
    """Batches of sentences of similar length, in a new order at every iteration.

    Args:
        sentences: lists of token ids.
        labels: the labels of the sentences.
        batch_size: the number of sentences in a batch.
        shuffle: the generator for the order. Without it, sentences are ordered by length.
    """

    def __init__(
        self,
        sentences: Sequence[list[int]],
        labels: Sequence[int],
        batch_size: int,
        shuffle: random.Random | None = None,
    ) -> None:
        self.sentences, self.labels = sentences, labels
        self.batch_size, self.shuffle = batch_size, shuffle

    def __len__(self) -> int:
        return -(-len(self.sentences) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        order = list(range(len(self.sentences)))
        size = self.batch_size
        block = len(order) if self.shuffle is None else 50 * size
        if self.shuffle is not None:
            self.shuffle.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), block):
            part = sorted(order[start : start + block], key=lambda i: len(self.sentences[i]))
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        if self.shuffle is not None:
            self.shuffle.shuffle(batches)
        for batch in batches:
            yield padded([self.sentences[i] for i in batch]), self._targets(batch)

    def _targets(self, batch: Sequence[int]) -> Tensor:
        return torch.tensor([self.labels[i] for i in batch], device="cpu")


def padded(sentences: Sequence[list[int]]) -> dict[str, Tensor]:
    """Token ids, padded by 0 to the longest sentence, and their attention mask."""
    longest = max(map(len, sentences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sentences], device="cpu")
    lengths = torch.tensor([len(s) for s in sentences], device="cpu")
    mask = torch.arange(longest, device="cpu") < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def read(path: Path) -> tuple[list[str], list[int]]:
    """The sentences and labels of a file of SST-2."""
    rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()[1:]]
    return [sentence for _, sentence in rows], [int(label) for label, _ in rows]


def load_sentences(
    tokenizer: Any,
    folder: Path,
    *,
    count: int,
    batch_size: int,
    seed: int,
    holdout: int,
    validate: bool,
) -> tuple[Batches, Batches]:
    """Batches for training, and batches for testing: those of `dev.tsv`, or held-out sentences for
    validation.

    Args:
        tokenizer: the tokenizer of the network.
        folder: the folder of SST-2.
        count: the number of training sentences.
        batch_size: the number of training sentences in a batch.
        seed: the seed for the choice and the order of the training sentences.
        holdout: the number of training sentences that are held out. They are the same for every
            seed.
        validate: whether to test on the held-out sentences.
    """
    sentences, labels = read(folder / "train.tsv")
    order = list(range(len(sentences)))
    random.Random(0).shuffle(order)
    held, rest = order[:holdout], order[holdout:]
    shuffle = random.Random(seed)
    chosen = shuffle.sample(rest, count)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=64)[
            "input_ids"
        ]
        return encoded

    def of(indices: Sequence[int], *rest: Any) -> Batches:
        return Batches(encode([sentences[i] for i in indices]), [labels[i] for i in indices], *rest)

    train = of(chosen, batch_size, shuffle)
    if validate:
        return train, of(held, 64)
    texts, test_labels = read(folder / "dev.tsv")
    return train, Batches(encode(texts), test_labels, 64)
