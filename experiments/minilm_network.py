"""MiniLM as a classifier of sentences: its construction, an example of its input, and its size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.pruning.macs import count_macs, count_parameters

__all__ = ["SentenceClassifier", "build", "description", "example", "pretrained"]

#: The length at which MACs are counted and latency is measured.
LENGTH = 32


class SentenceClassifier(nn.Module):
    """A sequence classifier of transformers that returns its logits ``[batch, classes]``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of token ids ``[batch, length]``, with a mask that is 0 at the padding."""
        output = self.net(input_ids=input_ids, attention_mask=attention_mask)
        logits: Tensor = output.logits
        return logits


def build(config: Mapping[str, Any]) -> SentenceClassifier:
    """The dense network of a configuration of BERT, with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    return SentenceClassifier(BertForSequenceClassification(BertConfig(**config)))


def pretrained(model: Path) -> SentenceClassifier:
    """The pretrained network, with a new classifier and frozen embeddings."""
    from transformers import BertForSequenceClassification

    net = BertForSequenceClassification.from_pretrained(model, num_labels=2)
    net.bert.embeddings.requires_grad_(False)
    return SentenceClassifier(net).eval()


def example(batch: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
    """An input of the network: token ids and their mask."""
    ids = torch.arange(batch * length, device="cpu").view(batch, length) % 30 + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def description(net: nn.Module) -> dict[str, int]:
    """The MACs of a sentence of 32 tokens, the number of parameters, and that of the layers of the
    encoder.
    """
    return {
        "macs": count_macs(net, example(1)),
        "parameters": count_parameters(net),
        "encoder_parameters": count_parameters(net.get_submodule("net.bert.encoder")),
    }
