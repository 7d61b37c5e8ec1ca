"""Networks that are not a straight line: what is gated, and that cutting it is exact."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_sbp.gates.attention import Attention, separate_attention
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.nested import convert
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import relative_difference, shrink, surviving_units


class Net(nn.Module):
    """A network from layers by name and a function."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def image(*shape):
    return torch.randn(2, *shape)


def conv(a, b, size=1, **options):
    return nn.Conv2d(a, b, size, padding=size // 2, **options)


def branches_into_sum_and_concatenation():
    def forward(n, x):
        a, b = n.a(x).relu(), n.b(x).relu()
        return n.head(torch.cat([n.c(a + b), n.d(a)], 1).mean((2, 3)))

    layers = {"a": conv(3, 6), "b": conv(3, 6), "c": conv(6, 5), "d": conv(6, 4)}
    return Net(forward, **layers, head=nn.Linear(9, 3)), image(3, 4, 4), {"a": 6, "c": 5, "d": 4}


def read_by_three():
    def forward(n, x):
        x = n.a(x).relu()
        return n.b(x) + n.c(x) * n.d(x)

    layers = {"b": nn.Linear(7, 2), "c": nn.Linear(7, 2), "d": nn.Linear(7, 2)}
    return Net(forward, a=nn.Linear(3, 7), **layers), image(3), {"a": 7}


def called_twice():
    def forward(n, x):
        return n.head(n.shared(n.shared(n.stem(x)).relu()).relu())

    layers = {"stem": nn.Linear(4, 5), "shared": nn.Linear(5, 5), "head": nn.Linear(5, 2)}
    return Net(forward, **layers), image(4), {"stem": 5}


def tied_weights():
    net = Net(
        lambda n, x: n.out(n.b(n.a(x).relu()).relu()),
        a=nn.Linear(4, 4), b=nn.Linear(4, 4), out=nn.Linear(4, 2),
    )  # fmt: skip
    net.b.weight = net.a.weight
    return net, image(4), {}


def uneven_pooling():
    def forward(n, x):
        return n.head(F.adaptive_max_pool2d(n.a(x), (2, 3)).flatten(1))

    return Net(forward, a=conv(2, 5, 3), head=nn.Linear(30, 3)), image(2, 7, 8), {"a": 5}


def nothing_to_gate():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh()), image(3), {}


def branches_on_data():
    def forward(n, x):
        x = n.a(x)
        x = n.b(x) if x.sum() > 0 else n.c(x)
        return n.head(x.relu())

    layers = {"b": nn.Linear(4, 6), "c": nn.Linear(4, 6), "head": nn.Linear(6, 2)}
    return Net(forward, a=nn.Linear(3, 4), **layers), image(3), None


def grouped():
    def forward(n, x):
        return n.head(n.c(n.b(n.a(x).relu()).relu()).mean((2, 3)))

    layers = {"a": conv(3, 12), "b": conv(12, 24, 3, groups=4), "c": conv(24, 6)}
    gates = {"a": 12, "b": 24, "c": 6}
    return Net(forward, **layers, head=nn.Linear(6, 2)), image(3, 5, 5), gates


def depthwise_multiplier():
    def forward(n, x):
        return n.head(n.b(n.a(x).relu()).relu().mean((2, 3)))

    layers = {"a": conv(3, 6), "b": conv(6, 12, 3, groups=6), "head": nn.Linear(12, 2)}
    return Net(forward, **layers), image(3, 5, 5), {"a": 6, "b": 12}


def depthwise():
    def forward(n, x):
        return n.head(n.bn(n.b(n.a(x)).relu()).mean((2, 3)))

    layers = {"a": conv(3, 6), "b": conv(6, 6, 3, groups=6), "bn": nn.BatchNorm2d(6)}
    return Net(forward, **layers, head=nn.Linear(6, 2)), image(3, 5, 5), {"a": 6}


def squeeze_and_excitation():
    def forward(n, x):
        x = n.a(x).relu()
        x = x * n.up(n.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return n.head(x).mean((2, 3))

    layers = {"a": conv(3, 8), "down": conv(8, 4), "up": conv(4, 8), "head": conv(8, 2)}
    return Net(forward, **layers), image(3, 4, 4), {"a": 8, "down": 4}


def channel_shuffle():
    def forward(n, x):
        x = n.a(x).relu()
        return n.head(F.channel_shuffle(x, 2).mean((2, 3)))

    return Net(forward, a=conv(3, 8), head=nn.Linear(8, 2)), image(3, 4, 4), {"a": 4}


def lstm():
    def forward(n, x):
        out, _ = n.lstm(n.a(x).relu())
        return n.head(n.b(out[:, -1]).relu())

    layers = {"a": nn.Linear(3, 5), "lstm": nn.LSTM(5, 6, batch_first=True)}
    layers |= {"b": nn.Linear(6, 7), "head": nn.Linear(7, 2)}
    return Net(forward, **layers), image(4, 3), {"a": 5, "lstm": 6, "b": 7}


def u_net():
    def forward(n, x):
        high = n.a(x).relu()
        low = n.b(F.max_pool2d(high, 2)).relu()
        return n.head(torch.cat([n.up(low), high], 1).relu())

    layers = {"a": conv(1, 6, 3), "b": conv(6, 8, 3), "up": nn.ConvTranspose2d(8, 5, 2, stride=2)}
    return Net(forward, **layers, head=conv(11, 1)), image(1, 8, 8), {"a": 6, "b": 8, "up": 5}


def channels_last():
    net = nn.Sequential(conv(3, 6, 3), nn.PReLU(6), conv(6, 4), nn.AdaptiveAvgPool2d(1))
    net.append(nn.Flatten()).append(nn.Linear(4, 2))
    x = image(3, 6, 6).to(memory_format=torch.channels_last)
    return net.to(memory_format=torch.channels_last), x, {"0": 6, "2": 4}


def in_float64():
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).double()
    return net, image(3).double(), {"0": 5}


def in_bfloat16():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).bfloat16(), image(3), {"0": 5}


def embedding():
    def forward(n, tokens):
        return n.head(n.a(n.words(tokens).mean(1)).relu())

    layers = {"words": nn.Embedding(11, 6), "a": nn.Linear(6, 5), "head": nn.Linear(5, 2)}
    return Net(forward, **layers), torch.randint(11, (2, 3)), {"words": 6, "a": 5}


def transformer():
    net = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    return separate_attention(net), image(4, 12), {"self_attn.query": 3, "linear1": 20}


def frozen():
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).requires_grad_(False)
    return net, image(3), {"0": 5}


def inputs_and_outputs_in_structures():
    def forward(n, a, b):
        x = (n.a(a) + n.b(b)).relu()
        return {"x": n.x(x), "rest": (n.y(x), [n.z(b)])}

    layers = {"a": nn.Linear(3, 5), "b": nn.Linear(2, 5), "x": nn.Linear(5, 2)}
    net = Net(forward, **layers, y=nn.Linear(5, 1), z=nn.Linear(2, 3))
    return net, {"a": image(3), "b": image(2)}, {"a": 5}


CASES = [
    branches_into_sum_and_concatenation,
    read_by_three,
    called_twice,
    tied_weights,
    uneven_pooling,
    nothing_to_gate,
    branches_on_data,
    grouped,
    depthwise_multiplier,
    depthwise,
    squeeze_and_excitation,
    channel_shuffle,
    lstm,
    u_net,
    channels_last,
    in_float64,
    in_bfloat16,
    embedding,
    transformer,
    frozen,
    inputs_and_outputs_in_structures,
]


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("share", [0.35, 0.9])
def test_cutting_is_exact(make, share):
    torch.manual_seed(2)
    net, x, expected = make()
    before = copy.deepcopy(net)
    gates = find_gates(net, x)
    if expected is not None:
        assert {gate.name: gate.size for gate in gates} == expected
        assert len(gates) > 0 or gates.not_prunable
    theta = {
        gate.name: torch.rand(gate.size, dtype=torch.float64) * (torch.rand(gate.size) > share)
        for gate in gates
    }
    exact, x64 = copy.deepcopy(net).double().eval(), convert(x, torch.float64)
    masked = GatedNetwork(exact, gates)(x64, {name: t[None] for name, t in theta.items()})
    small = shrink(exact, gates, theta, x64)
    assert relative_difference(masked, small(*_args(x64)[0], **_args(x64)[1])) <= 1e-10
    for name, units in surviving_units(gates, theta).items():
        assert 1 <= units.remaining.sum() <= len(theta[name])
        assert not (units.kept & ~units.remaining).any()
    if gates:
        weights = [sum(p.numel() for p in module.parameters()) for module in (exact, small)]
        assert weights[1] < weights[0] or (share < 0.5 and weights[1] == weights[0])
    # The original is as it was.
    assert net.training == before.training
    for (name, value), old in zip(
        net.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(value, old) and value.dtype == old.dtype, name
    for value, old in zip(net.parameters(), before.parameters(), strict=True):
        assert value.requires_grad == old.requires_grad


def _args(x):
    return ((), x) if isinstance(x, dict) else ((x,), {})


def test_a_group_that_is_gone_whole_is_removed():
    net, x, _ = grouped()
    gates = find_gates(net, x)
    theta = {gate.name: torch.ones(gate.size) for gate in gates}
    theta["a"][3:6] = 0  # the columns of the second group
    theta["b"][6:12] = 0  # and its rows
    small = shrink(net, gates, theta, x)
    assert (small.b.groups, small.b.in_channels, small.b.out_channels) == (3, 9, 18)
    theta["a"][0] = 0  # one column of the first group alone cannot go
    small = shrink(net, gates, theta, x)
    assert (small.b.groups, small.b.in_channels) == (3, 9)
    assert int(surviving_units(gates, theta)["a"].zeroed.sum()) == 1
    theta["a"][[7, 10]] = 0  # one of each group can
    small = shrink(net, gates, theta, x)
    assert (small.b.groups, small.b.in_channels, small.b.weight.shape[1]) == (3, 6, 2)


def test_heads_are_units():
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(12, 3, batch_first=True)
    attention = separate_attention(nn.ModuleDict({"attn": plain}))["attn"]
    assert isinstance(attention, Attention)
    q, kv = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    causal = torch.ones(5, 7).tril() == 0
    padding = torch.zeros(2, 7).bool()
    padding[:, 5:] = True
    for options in (
        {},
        {"need_weights": False},
        {"attn_mask": causal},
        {"attn_mask": causal.float() * -1e4, "need_weights": False},
        {"key_padding_mask": padding, "average_attn_weights": False},
    ):
        ours, theirs = attention(q, kv, kv, **options), plain(q, kv, kv, **options)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, atol=1e-6)
    net = separate_attention(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True))
    gates = find_gates(net, q)
    theta = {gate.name: torch.ones(gate.size) for gate in gates}
    theta["self_attn.query"][1] = 0
    small = shrink(net, gates, theta, q)
    assert small.self_attn.query.out_features == small.self_attn.value.out_features == 8
    assert small.self_attn.head_dim == 4 and small.self_attn.out.in_features == 8


def test_attention_of_other_layouts():
    torch.manual_seed(0)
    for options in ({"batch_first": False}, {"kdim": 5, "vdim": 6}, {"bias": False}):
        plain = nn.MultiheadAttention(8, 2, **options)
        q, k, v = torch.randn(4, 3, 8), torch.randn(6, 3, plain.kdim), torch.randn(6, 3, plain.vdim)
        for a, b in zip(Attention(plain)(q, k, v), plain(q, k, v), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match="add_zero_attn"):
        Attention(nn.MultiheadAttention(8, 2, add_zero_attn=True))
    with pytest.raises(ValueError, match="one mask for all heads"):
        Attention(nn.MultiheadAttention(8, 2))(q, q, q, attn_mask=torch.zeros(6, 4, 4))


def test_a_u_net_with_its_own_likelihood_is_pruned():
    import pyro.distributions as dist

    import pyro_sbp as sbp

    torch.manual_seed(0)
    net, x, _ = u_net()
    gates = find_gates(net, x)
    model = sbp.GatedModel(
        net, gates, num_data=2, likelihood=lambda out: dist.Bernoulli(logits=out).to_event(3)
    )
    guide = sbp.TruncatedLogNormalGuide(model)
    with torch.no_grad():
        guide.posteriors()
        for name in ("a", "up"):
            getattr(guide.log_scales, name)[1:3] = 4.0
    small = sbp.prune(model, guide, x)
    assert small.a.out_channels == 4 and small.up.out_channels == 3 and small.b.in_channels == 4


def check(net, x, size=6):
    """Gates of a network whose first layer `a` must not be cut."""
    gates = find_gates(net, x)
    assert "a" not in [gate.name for gate in gates], gates
    return gates.not_prunable["a"]


def two(width=6, **more):
    return {"a": nn.Linear(4, width), "head": nn.Linear(width, 3), **more}


def test_a_large_output_hides_nothing():
    def forward(n, x):
        h = n.a(x).relu()
        h = h / (1 + (h > 0).to(h.dtype).sum(1, keepdim=True))
        return n.head(h).masked_fill(torch.tensor([True, False, False]), -1e9)

    assert "changes the output" in check(Net(forward, **two()), torch.randn(5, 4))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor


def test_outputs_in_dataclasses_count_and_other_objects_are_refused():
    def forward(n, x):
        h = n.a(x).relu()
        return Output(n.head(h), h)

    assert "output" in check(Net(forward, **two()), torch.randn(2, 4))
    net = Net(lambda n, x: object(), **two())
    with pytest.raises(ValueError, match="cannot look into a object"):
        find_gates(net, torch.randn(2, 4))


def test_a_layer_that_the_example_does_not_call_forbids_gates():
    def forward(n, x):
        h = n.a(x).relu()
        return n.head(h) if x.sum() > 0 else n.other(h)

    net = Net(forward, **two(other=nn.Linear(6, 3)))
    assert "'other' is not called" in check(net, torch.ones(2, 4))
    assert sizes(find_gates(net, torch.ones(2, 4), ignore=["other"])) == {"a": 6}


def test_a_layer_to_ignore_must_be_one_of_the_network():
    net = Net(lambda n, x: n.head(n.a(x)), **two(other=nn.Linear(6, 3), norm=nn.ReLU()))
    words = "ignore names 'othr', which is not a .* layer of the network; did you mean 'other'?"
    with pytest.raises(ValueError, match=words):
        find_gates(net, torch.ones(2, 4), ignore=["other", "othr"])
    with pytest.raises(ValueError, match="ignore names 'norm'"):
        find_gates(net, torch.ones(2, 4), ignore=["norm"])


def sizes(gates):
    return {gate.name: gate.size for gate in gates}


def test_heads_of_training_mode_are_cut_with_the_rest():
    def forward(n, x):
        h = n.a(x).relu()
        return (n.head(h), n.aux(h)) if n.training else n.head(h)

    net, x = Net(forward, **two(aux=nn.Linear(6, 2))), torch.randn(2, 4)
    gates = find_gates(net, x)
    assert {span.layer for span in gates[0].readers} == {"head", "aux"}
    small = shrink(net.train(), gates, {"a": torch.tensor([0.0, 1, 0, 1, 1, 1])}, x)
    assert small.aux.in_features == 4 and len(small(x)) == 2


@pytest.mark.parametrize("width", [6, 8, 12, 16])
def test_code_that_counts_on_a_width_is_found_out(width):
    def parts(n, x):
        first, second = n.a(x).relu().tensor_split([2], 1)
        return n.head(first) + n.other(second)

    other = nn.Linear(width - 2, 3)
    net = Net(parts, a=nn.Linear(4, width), head=nn.Linear(2, 3), other=other)
    check(net, torch.randn(2, 4))


def test_a_squeeze_that_one_unit_would_fall_to_is_found_out():
    net = Net(lambda n, x: n.head(n.a(x).mean((2, 3), keepdim=True).squeeze()),
              a=conv(2, 5), head=nn.Linear(5, 3))  # fmt: skip
    assert "cutting it" in check(net, image(2, 4, 4))


def test_an_embedding_that_normalises_its_rows_is_not_prunable():
    net = Net(lambda n, t: n.head(n.words(t)), words=nn.Embedding(9, 6, max_norm=1.0),
              head=nn.Linear(6, 2))  # fmt: skip
    assert find_gates(net, torch.randint(9, (2, 3))) == []


def test_computed_weights_are_not_prunable_every_time():
    for _ in range(10):
        net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        nn.utils.parametrizations.weight_norm(net[1])
        gates = find_gates(net, torch.randn(2, 4))
        assert sizes(gates) == {"2": 4} and gates.not_prunable["1"] == "computes its weight"


def test_what_fails_on_nan_is_not_prunable():
    def forward(n, x):
        h = n.a(x)
        return n.head(h.relu()) if h.sum() > -1e9 else n.other(h)

    net, x = Net(forward, **two(other=nn.Linear(6, 3))), torch.ones(2, 4)
    gates = find_gates(net, x, ignore=["other"])
    assert gates == [] and "fails on NaN" in gates.not_prunable["a"]


def test_random_numbers_and_inputs_stay_as_they_were():
    def forward(n, x):
        x -= 1
        h = n.a(x).relu()
        return n.head(h) + torch.randn(3)

    net, x = Net(forward, **two()), torch.ones(2, 4)
    state = torch.get_rng_state()
    assert sizes(find_gates(net, x)) == {"a": 6}
    assert torch.equal(x, torch.ones(2, 4)) and torch.equal(torch.get_rng_state(), state)


def test_shared_attention_stays_shared_and_encoders_take_padding():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    net = separate_attention(nn.ModuleList([nn.ModuleDict({"x": attention, "y": attention})]))
    assert net[0]["x"] is net[0]["y"] and isinstance(net[0]["x"], Attention)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 4, 8), torch.zeros(2, 4).bool()
    padding[0, 3] = True
    with torch.no_grad():
        ours = separate_attention(plain)(x, src_key_padding_mask=padding)
        plain.use_nested_tensor = False  # torch warns of it
        theirs = plain(x, src_key_padding_mask=padding)
    assert torch.allclose(ours[0, :3], theirs[0, :3], atol=1e-5)
    assert torch.allclose(ours[1], theirs[1], atol=1e-5)


@pytest.mark.parametrize(
    ("features", "words"), [(["head", "head"], "twice"), (["idle"], "not called")]
)
def test_input_features_must_be_called_and_named_once(features, words):
    net = Net(lambda n, x: n.head(n.a(x)), **two(idle=nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=words):
        find_gates(net, torch.randn(2, 4), features, ignore=["idle"])


def test_a_causal_hint_needs_a_mask_as_in_torch():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 3, 8)
    for layer in (attention, Attention(attention)):
        with pytest.raises((RuntimeError, ValueError), match="attn_mask"):
            layer(x, x, x, is_causal=True)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    expected, _ = attention(x, x, x, attn_mask=mask, is_causal=True)
    actual, _ = Attention(attention)(x, x, x, attn_mask=mask, is_causal=True)
    torch.testing.assert_close(actual, expected)
