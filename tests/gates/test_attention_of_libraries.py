"""Heads of transformers' and timm's networks, where these libraries are installed."""

import pytest
import torch

from pyro_sbp.gates.calling import call
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.proving import enliven
from pyro_sbp.gates.surgery import relative_difference, shrink

TINY = {"vocab_size": 50, "num_hidden_layers": 2, "intermediate_size": 48, "hidden_size": 32}


def tokens():
    return {"input_ids": torch.randint(50, (2, 7))}


def bert(transformers):
    config = transformers.BertConfig(**TINY, num_attention_heads=4)
    return transformers.BertModel(config), tokens(), "attention.self.query"


def distilbert(transformers):
    config = transformers.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4)
    return transformers.DistilBertModel(config), tokens(), "attention.q_lin"


def llama(transformers):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "use_cache": False}
    config = transformers.LlamaConfig(**TINY, **heads)
    return transformers.LlamaForCausalLM(config), tokens(), "self_attn.q_proj"


def phi3(transformers):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "use_cache": False}
    config = transformers.Phi3Config(**TINY, **heads, pad_token_id=0)
    return transformers.Phi3ForCausalLM(config), tokens(), "self_attn.qkv_proj"


def falcon(transformers):
    options = {**TINY, "num_attention_heads": 8, "num_kv_heads": 4, "use_cache": False}
    del options["intermediate_size"]
    config = transformers.FalconConfig(**options, new_decoder_architecture=True)
    return transformers.FalconForCausalLM(config), tokens(), "self_attention.query_key_value"


def deberta(transformers):
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    config = transformers.DebertaConfig(**TINY, num_attention_heads=4, **relative)
    return transformers.DebertaModel(config), tokens(), "attention.self.in_proj"


def gpt2(transformers):
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, use_cache=False)
    return transformers.GPT2LMHeadModel(config), tokens(), "attn.c_attn"


def vit(timm):
    options = {"img_size": 32, "depth": 2, "num_heads": 4, "embed_dim": 32, "num_classes": 5}
    net = timm.create_model("vit_tiny_patch16_224", **options)
    return net, torch.randn(2, 3, 32, 32), "attn.qkv"


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("transformers", bert),
        ("transformers", distilbert),
        ("transformers", llama),
        ("transformers", phi3),
        ("transformers", falcon),
        ("transformers", deberta),
        ("transformers", gpt2),
        ("timm", vit),
    ],
    ids=["bert", "distilbert", "llama", "phi3", "falcon", "deberta", "gpt2", "vit"],
)
@pytest.mark.filterwarnings("ignore")
def test_heads_and_hidden_units_of_every_block_are_cut(library, make):
    torch.manual_seed(0)
    net, x, writer = make(pytest.importorskip(library))
    net = net.double().eval()
    enliven(net, torch.Generator().manual_seed(0))
    x = x.double() if isinstance(x, torch.Tensor) else x
    gates = find_gates(net, x)
    heads = [gate for gate in gates if gate.name.endswith(writer)]
    assert [gate.size for gate in heads] == [4, 4] and len(gates) == 4
    theta = {gate.name: 0.5 + torch.rand(gate.size).double() for gate in gates}
    for gate in gates:
        theta[gate.name][1 : 1 + gate.size // 3] = 0
    with torch.no_grad():
        masked = GatedNetwork(net, gates)(x, {name: value[None] for name, value in theta.items()})
        small = shrink(net, gates, theta, x)
        assert relative_difference(masked, call(small, x)) <= 1e-10
    for gate in heads:
        before, after = (n.get_submodule(gate.name).weight.numel() for n in (net, small))
        assert after == before * 3 // 4
