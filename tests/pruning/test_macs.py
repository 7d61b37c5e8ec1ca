"""MACs against arithmetic that is written out, on every device and in every dtype."""

import contextlib
import copy

import pyro
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import pyro_sbp as sbp
from pyro_sbp import networks
from pyro_sbp.gates.attention import separate_attention
from pyro_sbp.gates.nested import convert
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.pruning.costs import UnitCosts
from pyro_sbp.pruning.macs import costs_by_layer, count_macs, count_parameters, unfused


def vgg_macs():
    macs, channels, size = 0, 3, 32
    for block in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for width in block:
            macs += 9 * channels * width * size**2
            channels = width
        size //= 2
    return macs + 512 * 512 + 512 * 10


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (networks.LeNet500_300, (1, 28, 28), 784 * 500 + 500 * 300 + 300 * 10),
        (networks.LeNet300_100, (1, 28, 28), 784 * 300 + 300 * 100 + 100 * 10),
        (
            networks.LeNet5,
            (1, 28, 28),
            24**2 * 25 * 20 + 8**2 * 25 * 20 * 50 + 800 * 500 + 500 * 10,
        ),
        (networks.VGGLike, (3, 32, 32), vgg_macs()),
    ],
)
def test_macs_of_the_papers_networks(make, shape, expected):
    assert count_macs(make(), torch.zeros(1, *shape)) == expected


def test_vgg_like_has_the_published_size():
    net = networks.VGGLike()
    assert count_macs(net, torch.zeros(1, 3, 32, 32)) == pytest.approx(313.5e6, rel=1e-3)
    weights = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert weights == pytest.approx(14.98e6, rel=1e-3)


class SelfAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` of one input with itself."""

    def __init__(self, need_weights, **options):
        super().__init__(16, 4, batch_first=True, **options)
        self.need_weights = need_weights

    def forward(self, x):
        return super().forward(x, x, x, need_weights=self.need_weights)[0]


class Products(nn.Module):
    """A function of its inputs, without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def with_backend(q, k, v):
    """As in a network that chooses its kernel itself."""
    backend = SDPBackend.FLASH_ATTENTION if q.device.type == "cpu" else SDPBackend.MATH
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def attention(batch, queries, keys, width):
    """The products with the keys and with the values."""
    return 2 * batch * queries * keys * width


def encoder_layer(batch, tokens, width, hidden):
    linear = batch * tokens * (3 * width * width + width * width + 2 * width * hidden)
    return linear + attention(batch, tokens, tokens, width)


def swin_stage(windows, tokens, width):
    """Two blocks over so many windows of so many tokens, with an MLP four times as wide."""
    block = windows * tokens * (3 + 1 + 2 * 4) * width**2 + attention(
        windows, tokens, tokens, width
    )
    return 2 * block


def vit():
    return VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=10,
    )


VIT = 16 * (3 * 8 * 8) * 32 + 2 * encoder_layer(1, 17, 32, 64) + 32 * 10
SEQUENCE = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False, False, False, True, True], [False] * 5])
HEADS, FEWER_HEADS = torch.randn(2, 8, 5, 4), torch.randn(2, 2, 5, 4)


def layer():
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)


CASES = {
    "LSTM": (lambda: nn.LSTM(16, 8, batch_first=True), SEQUENCE, 10 * 4 * 8 * (16 + 8)),
    "LSTM, one step": (lambda: nn.LSTM(16, 8), SEQUENCE[:1, :1], 4 * 8 * (16 + 8)),
    "LSTM, two ways, two layers": (
        lambda: nn.LSTM(16, 8, 2, batch_first=True, bidirectional=True),
        SEQUENCE,
        2 * 10 * 4 * 8 * (16 + 8) + 2 * 10 * 4 * 8 * (2 * 8 + 8),
    ),
    "LSTM with projections": (
        lambda: nn.LSTM(16, 8, batch_first=True, proj_size=4),
        SEQUENCE,
        10 * (4 * 8 * (16 + 4) + 8 * 4),
    ),
    "GRU": (lambda: nn.GRU(16, 8, batch_first=True), SEQUENCE, 10 * 3 * 8 * (16 + 8)),
    "RNN": (lambda: nn.RNN(16, 8, batch_first=True), SEQUENCE, 10 * 8 * (16 + 8)),
    "attention with weights": (
        lambda: SelfAttention(True),
        SEQUENCE,
        10 * 4 * 16 * 16 + attention(2, 5, 5, 16),
    ),
    "attention without weights": (
        lambda: SelfAttention(False),
        SEQUENCE,
        10 * 4 * 16 * 16 + attention(2, 5, 5, 16),
    ),
    "attention without a batch": (
        lambda: SelfAttention(False),
        SEQUENCE[0],
        5 * 4 * 16 * 16 + attention(1, 5, 5, 16),
    ),
    "attention with one more key": (
        lambda: SelfAttention(False, add_bias_kv=True),
        SEQUENCE,
        10 * 4 * 16 * 16 + attention(2, 5, 6, 16),
    ),
    "encoder layer": (layer, SEQUENCE, encoder_layer(2, 5, 16, 32)),
    "encoder": (
        lambda: nn.TransformerEncoder(layer(), 2),
        SEQUENCE,
        2 * encoder_layer(2, 5, 16, 32),
    ),
    "encoder with padding": (  # which runs on nested tensors otherwise
        lambda: nn.TransformerEncoder(layer(), 2),
        {"src": SEQUENCE, "src_key_padding_mask": PADDING},
        2 * encoder_layer(2, 5, 16, 32),
    ),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(16, 4, 32, batch_first=True),
        (SEQUENCE, SEQUENCE[:, :3]),
        # The keys and values of the second attention are those of three tokens.
        encoder_layer(2, 5, 16, 32) + 2 * (5 + 3 + 3 + 5) * 16 * 16 + attention(2, 5, 3, 16),
    ),
    "ViT": (vit, IMAGE, VIT),
    "Swin": (
        lambda: SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10),
        IMAGE,
        64 * (3 * 4 * 4) * 16
        + swin_stage(4, 16, 16)
        + 16 * (4 * 16) * 32
        + swin_stage(1, 16, 32)
        + 32 * 10,
    ),
    "attention with grouped queries": (
        lambda: Products(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
        (HEADS, FEWER_HEADS, FEWER_HEADS),
        attention(2 * 8, 5, 5, 4),
    ),
    "causal attention": (
        lambda: Products(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        (HEADS, HEADS, HEADS),
        attention(2 * 8, 5, 5, 4),
    ),
    "attention in a kernel of its choice": (
        lambda: Products(with_backend),
        (HEADS, HEADS, HEADS),
        attention(2 * 8, 5, 5, 4),
    ),
    "matrix by vector": (lambda: Products(torch.mv), (SEQUENCE[0], SEQUENCE[0, 0]), 5 * 16),
    "vector by vector": (lambda: Products(torch.dot), (SEQUENCE[0, 0], SEQUENCE[0, 1]), 16),
    "sum and matrix by vector": (
        lambda: Products(torch.addmv),
        (torch.ones(5), SEQUENCE[0], SEQUENCE[0, 0]),
        5 * 16,
    ),
    "sum of a batch of products": (
        lambda: Products(torch.addbmm),
        (torch.ones(5, 5), SEQUENCE, SEQUENCE.mT.contiguous()),
        2 * 5 * 16 * 5,
    ),
}
PLACES = {
    "float32": ("cpu", torch.float32),
    "float64": ("cpu", torch.float64),
    "bfloat16": ("cpu", torch.bfloat16),
    "meta": ("meta", torch.float32),
    "bfloat16 on meta": ("meta", torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_macs_are_the_arithmetic_everywhere(case, place, training):
    make, x, expected = CASES[case]
    device, dtype = PLACES[place]
    net = make().to(device, dtype).train(training)
    x = convert(x, dtype, torch.device(device))
    assert count_macs(net, x) == expected
    costs = costs_by_layer(net, x)
    assert sum(macs for macs, _ in costs.values()) == expected
    assert sum(parameters for _, parameters in costs.values()) == count_parameters(net)
    assert min(min(pair) for pair in costs.values()) >= 0


@pytest.mark.parametrize("case", ["encoder layer", "encoder", "encoder with padding", "ViT"])
@pytest.mark.parametrize("place", PLACES)
def test_separated_attention_has_the_same_macs(case, place):
    make, x, expected = CASES[case]
    device, dtype = PLACES[place]
    net = separate_attention(make()).to(device, dtype)
    assert count_macs(net, convert(x, dtype, torch.device(device))) == expected


@contextlib.contextmanager
def settings(fastpath, enabled):
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(fastpath)
    torch.backends.mkldnn.enabled = torch.backends.cudnn.enabled = enabled
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        torch.backends.mkldnn.enabled = before[1]
        torch.backends.cudnn.enabled = True


def current_settings():
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )


@pytest.mark.parametrize("fastpath", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_torch_s_settings_are_restored(fastpath, enabled):
    with settings(fastpath, enabled):
        before = current_settings()
        assert count_macs(vit(), IMAGE) == VIT
        assert sum(macs for macs, _ in costs_by_layer(vit(), IMAGE).values()) == VIT
        assert current_settings() == before
        with pytest.raises(RuntimeError):
            count_macs(vit(), IMAGE[:, :2])
        with pytest.raises(RuntimeError):
            costs_by_layer(vit(), IMAGE[:, :2])
        assert current_settings() == before
        with unfused():
            assert not torch.backends.mha.get_fastpath_enabled()
        assert current_settings() == before


@pytest.mark.parametrize("count", [count_macs, costs_by_layer])
def test_the_network_keeps_its_modes_statistics_and_hooks(count):
    net = networks.VGGLike(width=8).train()
    net.bn1.eval()
    modes = [module.training for module in net.modules()]
    state = copy.deepcopy(net.state_dict())
    count(net, torch.randn(1, 3, 32, 32))
    with pytest.raises(RuntimeError):
        count(net, torch.randn(1, 2, 32, 32))
    assert [module.training for module in net.modules()] == modes
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Gram(nn.Module):
    """A layer, and a product and a parameter that belong to none."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        y = self.layer(x)
        return self.scale[0] * y @ y.T


def test_costs_by_layer():
    costs = costs_by_layer(networks.LeNet5(), torch.rand(1, 1, 28, 28))
    assert costs == {
        "conv1": (24**2 * 25 * 20, 25 * 20 + 20),
        "conv2": (8**2 * 25 * 20 * 50, 25 * 20 * 50 + 50),
        "fc1": (800 * 500, 800 * 500 + 500),
        "fc2": (500 * 10, 500 * 10 + 10),
    }
    costs = costs_by_layer(Gram(), torch.rand(5, 6))
    assert costs == {"layer": (5 * 6 * 4, 28), "": (5 * 4 * 5, 3)}


def test_a_container_with_a_parameter_does_not_count_its_layers():
    """As the encoder of a ViT, which holds the position embedding."""
    costs = costs_by_layer(vit(), IMAGE)
    assert costs["encoder"] == (0, 17 * 32)
    block = "encoder.layers.encoder_layer_0"
    products = attention(1, 17, 17, 32)
    assert costs[f"{block}.self_attention"][0] == 17 * 4 * 32 * 32 + products
    assert costs[f"{block}.mlp.0"][0] == costs[f"{block}.mlp.3"][0] == 17 * 32 * 64
    assert costs[""] == (0, 32)  # the class token
    costs = costs_by_layer(separate_attention(vit()), IMAGE)
    assert costs[f"{block}.self_attention.query"] == (17 * 32 * 32, 32 * 32 + 32)
    assert costs[""] == (2 * products, 32)


def vit_macs(net):
    """The arithmetic of a ViT whose heads and hidden units may differ from block to block."""
    macs = 16 * (3 * 8 * 8) * 32 + 32 * net.heads.head.out_features
    for block in net.encoder.layers:
        width, hidden = block.self_attention.query.out_features, block.mlp[0].out_features
        macs += 17 * (4 * 32 * width + 2 * 32 * hidden) + attention(1, 17, 17, width)
    return macs


def test_a_budget_of_a_vit_is_met_by_the_arithmetic():
    pyro.set_rng_seed(0)
    net = separate_attention(vit()).eval()
    gates = find_gates(net, IMAGE)
    assert {gate.size for gate in gates} == {4, 64} and len(gates) == 4
    model = sbp.GatedModel(net, gates, num_data=10)
    guide = sbp.TruncatedLogNormalGuide(model)
    with torch.no_grad():
        for loc, log_scale in zip(
            guide.locs.parameters(), guide.log_scales.parameters(), strict=True
        ):
            loc.uniform_(-2.0, 0.0)
            log_scale.uniform_(-4.0, 2.0)
    small = sbp.prune(model, guide, IMAGE, macs_ratio=1.5)
    assert vit_macs(net) == VIT
    assert count_macs(small, IMAGE) == vit_macs(small) <= VIT / 1.5
    costs = UnitCosts(net, gates, IMAGE)
    assert costs.expected({}) == VIT
    # Queries, keys, values and output, and the two products inside attention, of 17 tokens.
    per_head = 17 * 4 * 32 * 8 + 2 * 17 * 17 * 8
    assert [costs.per_unit()[gate.name] for gate in gates if gate.size == 4] == [per_head] * 2
