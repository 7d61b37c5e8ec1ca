"""Networks of transformers in small configurations with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyro_sbp.experiments.survey.collections import Surveyed

__all__ = ["LIBRARIES", "build", "names"]

LIBRARIES = ("transformers",)
_WORDS = {"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
_TEXT = {**_WORDS, "intermediate_size": 192}
_GROUPED = {**_TEXT, "num_attention_heads": 12, "num_key_value_heads": 6, "pad_token_id": 0}
_IMAGES = {"image_size": 32, "patch_size": 8}
_VISION = {k: v for k, v in _TEXT.items() if k != "vocab_size"} | _IMAGES
_ENCODER_DECODER = {
    **{"vocab_size": 60, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 6, "decoder_attention_heads": 6},
    **{"encoder_ffn_dim": 192, "decoder_ffn_dim": 192},
}
_T5 = {"vocab_size": 60, "d_model": 48, "d_kv": 8, "d_ff": 192, "num_layers": 2, "num_heads": 6}
_CLIP = {"projection_dim": 32, "text_config": {**_TEXT}, "vision_config": {**_VISION}}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class _Entry:
    """How a network is made.

    Attributes:
        config, model: the names of the classes.
        options: the arguments of the configuration.
        inputs: the names of the inputs, which `_input` makes.
        blocks: as for `Surveyed`.
    """

    config: str
    model: str
    options: Mapping[str, Any]
    inputs: tuple[str, ...] = ("input_ids",)
    blocks: str | None = None


_PIXELS = ("pixel_values",)
_BOTH = ("input_ids", "decoder_input_ids")
_T5_BLOCKS = r"(encoder|decoder)\.block\.\d+"
_ENTRIES = {
    "bert": _Entry("BertConfig", "BertModel", _TEXT),
    "roberta": _Entry("RobertaConfig", "RobertaModel", _TEXT),
    "albert": _Entry("AlbertConfig", "AlbertModel", {**_TEXT, "embedding_size": 24}),
    "deberta": _Entry(
        "DebertaConfig",
        "DebertaModel",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "deberta-v2": _Entry(
        "DebertaV2Config",
        "DebertaV2Model",
        {
            **{**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
            **{"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        },
    ),
    "distilbert": _Entry(
        "DistilBertConfig",
        "DistilBertModel",
        {"vocab_size": 60, "dim": 48, "n_layers": 2, "n_heads": 6, "hidden_dim": 192},
    ),
    "electra": _Entry("ElectraConfig", "ElectraModel", {**_TEXT, "embedding_size": 24}),
    "mpnet": _Entry("MPNetConfig", "MPNetModel", _TEXT),
    "gpt2": _Entry(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 60, "n_embd": 48, "n_layer": 2, "n_head": 6, **_ENDS},
    ),
    "gpt-neox": _Entry("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_TEXT, **_ENDS}),
    "opt": _Entry(
        "OPTConfig",
        "OPTForCausalLM",
        {**_WORDS, "ffn_dim": 192, "word_embed_proj_dim": 48, **_ENDS},
    ),
    "falcon": _Entry(
        "FalconConfig",
        "FalconForCausalLM",
        {
            **{**_WORDS, "ffn_hidden_size": 192, **_ENDS},
            **{"new_decoder_architecture": True, "num_kv_heads": 3},
        },
    ),
    "llama": _Entry("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "mistral": _Entry("MistralConfig", "MistralForCausalLM", _GROUPED),
    "qwen2": _Entry("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "qwen3": _Entry("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gemma": _Entry("GemmaConfig", "GemmaForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gemma2": _Entry("Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gemma3": _Entry("Gemma3TextConfig", "Gemma3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "phi3": _Entry("Phi3Config", "Phi3ForCausalLM", _GROUPED),
    "t5": _Entry("T5Config", "T5Model", _T5, _BOTH, _T5_BLOCKS),
    "t5-encoder": _Entry("T5Config", "T5EncoderModel", _T5, blocks=_T5_BLOCKS),
    "bart": _Entry("BartConfig", "BartModel", {**_ENCODER_DECODER, **_ENDS}, _BOTH),
    "vit": _Entry("ViTConfig", "ViTForImageClassification", _VISION, _PIXELS),
    "deit": _Entry("DeiTConfig", "DeiTForImageClassification", _VISION, _PIXELS),
    "beit": _Entry("BeitConfig", "BeitForImageClassification", _VISION, _PIXELS),
    "dinov2": _Entry("Dinov2Config", "Dinov2ForImageClassification", _VISION, _PIXELS),
    "swin": _Entry(
        "SwinConfig",
        "SwinForImageClassification",
        {
            **{"image_size": 32, "patch_size": 2, "embed_dim": 24, "window_size": 4},
            **{"depths": [2, 2], "num_heads": [3, 6]},
        },
        _PIXELS,
    ),
    "swinv2": _Entry(
        "Swinv2Config",
        "Swinv2ForImageClassification",
        {
            **{"image_size": 32, "patch_size": 2, "embed_dim": 24, "window_size": 4},
            **{"depths": [2, 2], "num_heads": [3, 6]},
        },
        _PIXELS,
    ),
    "convnext": _Entry(
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [96, 192], "depths": [2, 2], "num_stages": 2, "image_size": 32},
        _PIXELS,
        r".*\.layers\.\d+",
    ),
    "segformer": _Entry(
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        {
            **{"hidden_sizes": [24, 48, 72, 96], "num_attention_heads": [3, 3, 6, 6]},
            **{"decoder_hidden_size": 48},
        },
        ("large_pixel_values",),
    ),
    "clip": _Entry("CLIPConfig", "CLIPModel", _CLIP, ("input_ids", "pixel_values")),
    "siglip": _Entry("SiglipConfig", "SiglipModel", _CLIP, ("input_ids", "pixel_values")),
    "whisper": _Entry(
        "WhisperConfig",
        "WhisperModel",
        {
            **{**_ENCODER_DECODER, **_ENDS, "num_mel_bins": 16, "max_source_positions": 16},
            **{"decoder_start_token_id": 1},
        },
        ("input_features", "decoder_input_ids"),
    ),
    "wav2vec2": _Entry(
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        {
            **{**_TEXT, "conv_dim": [32, 32, 32], "conv_stride": [5, 2, 2]},
            **{"conv_kernel": [10, 3, 3], "num_feat_extract_layers": 3},
            **{"num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 16},
        },
        ("input_values",),
    ),
}


def names() -> list[str]:
    """The names of all networks."""
    return list(_ENTRIES)


def build(name: str) -> Surveyed:
    """A network with 6 heads or groups of heads per layer, or 3 in narrow layers."""
    import transformers

    entry = _ENTRIES[name]
    config = getattr(transformers, entry.config)(**entry.options)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # the cache would be an output of the network
    net = getattr(transformers, entry.model)(config)
    x = {kind.removeprefix("large_"): _input(kind) for kind in entry.inputs}
    return Surveyed(name, net, x, entry.blocks)


def _input(name: str) -> torch.Tensor:
    if name.endswith("input_ids"):
        return torch.randint(3, 60, (2, 12))
    sizes = {
        "pixel_values": (2, 3, 32, 32),
        "large_pixel_values": (2, 3, 64, 64),
        "input_features": (2, 16, 32),
        "input_values": (2, 800),
    }
    return torch.randn(sizes[name])
