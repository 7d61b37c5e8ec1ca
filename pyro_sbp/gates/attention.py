"""Multi-head attention in which each head is a unit that can be removed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_sbp.gates.copies import copy_network

__all__ = ["Attention", "separate_attention"]


class Attention(nn.Module):
    """Multi-head attention whose heads can be removed.

    It computes the same function as `nn.MultiheadAttention`, with separate layers for queries, keys
    and values. In `nn.MultiheadAttention`, the width of all heads together must equal the width of
    the model. Here, the number of heads is computed from the shapes of the layers. The width of a
    head, and with it the scale of the softmax, does not change when heads are removed.

    Args:
        attention: the module whose weights are copied.

    Raises:
        ValueError: the module has `add_bias_kv` or `add_zero_attn` set.
    """

    # nn.TransformerEncoderLayer reads these attributes, and then does not use its fast path.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("attention with add_bias_kv or add_zero_attn cannot be separated")
        width = attention.embed_dim
        self.head_dim = attention.head_dim
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first
        packed = attention.in_proj_weight
        weights = (
            (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            if packed is None
            else packed.split(width)
        )
        biases = (None,) * 3
        if attention.in_proj_bias is not None:
            biases = attention.in_proj_bias.split(width)
        self.query, self.key, self.value = map(_linear, weights, biases)
        self.out = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the attention, with the arguments and results of `nn.MultiheadAttention`.

        As there, `is_causal` only says that `attn_mask` is causal. It has no effect here. Without
        `attn_mask` it is an error, also where `nn.MultiheadAttention` ignores it (in evaluation
        mode without gradients).

        Raises:
            ValueError: `attn_mask` has three dimensions, with a mask for every head, or is missing
                although `is_causal` is true.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal needs attn_mask")
        turned = query.ndim == 3 and not self.batch_first
        if turned:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        mask = _additive(attn_mask, q)
        if mask is not None and mask.ndim != 2:
            raise ValueError(
                "attention whose heads can be removed needs one mask for all heads, "
                "but attn_mask has a mask for each head"
            )
        padding = _additive(key_padding_mask, q)
        if padding is not None:
            padding = padding[..., None, None, :]
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = F.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout, self.training)
            out = weights @ v
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out(out.transpose(-3, -2).flatten(-2))
        return out.transpose(0, 1) if turned else out, weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return layer


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Convert a mask to numbers that are added to the scores.

    They are minus infinity where a bool mask is true, and 0 elsewhere.
    """
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


def separate_attention(net: nn.Module) -> nn.Module:
    """Copy a network, and replace every `nn.MultiheadAttention` by an `Attention`.

    The copy computes the same function. `find_gates` finds the heads of its attention layers.

    Args:
        net: the network, which is not changed.

    Returns:
        The copy.

    Raises:
        ValueError: an attention layer has `add_bias_kv` or `add_zero_attn` set, or the network
            cannot be copied.
    """
    net = copy_network(net)
    if isinstance(net, nn.MultiheadAttention):
        return Attention(net)
    made: dict[nn.Module, Attention] = {}  # a module that is used twice is replaced once
    for module in list(net.modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its fast path works only with nn.MultiheadAttention
        for name, child in module._modules.items():
            if isinstance(child, nn.MultiheadAttention):
                if child not in made:
                    made[child] = Attention(child)
                setattr(module, name, made[child])
    return net


def has_attention(net: Any) -> bool:
    """Whether a network contains an `nn.MultiheadAttention`."""
    return any(isinstance(module, nn.MultiheadAttention) for module in net.modules())
