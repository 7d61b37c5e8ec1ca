"""Finding gates and pruning harm neither the network, nor what its user keeps, nor the process."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import DeformConv2d

import pyro_sbp as sbp
from pyro_sbp.gates.decisions import Decisions


class Net(nn.Module):
    """Three dense layers a, b and c, with a function between them."""

    def __init__(self, between, *, forward=None):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x):
        return self.c(self.between(self.b(self.between(self.a(x)))))


def names(net, x=None):
    torch.manual_seed(1)
    return [gate.name for gate in sbp.find_gates(net, torch.randn(3, 4) if x is None else x)]


def pruned(net, x):
    """The network without the units whose number is a multiple of three."""
    gates = sbp.find_gates(net, x)
    model = sbp.GatedModel(net, gates, num_data=10)
    guide = sbp.TruncatedLogNormalGuide(model)
    with torch.no_grad():
        for gate in gates:
            gone = torch.arange(gate.size) % 3 == 0
            dict(guide.locs.named_parameters())[f"{gate.name}_unconstrained"].copy_(-18.0 * gone)
            scales = dict(guide.log_scales.named_parameters())[f"{gate.name}_unconstrained"]
            scales.copy_(6.0 * gone - 3)
    return sbp.prune(model, guide, x)


def no_nan(h):
    assert not torch.isnan(h).any()
    return h.relu()


def zero_nan(h):
    h = h.relu().clone()
    h[torch.isnan(h)] = 0
    return h


def own_nan(h):
    """Rows that are masked fully are NaN, which the network replaces."""
    gone = torch.full_like(h, -torch.inf).where(torch.arange(len(h))[:, None] == 0, 0.0)
    return h.relu() * torch.nan_to_num((gone + 0 * h).softmax(1))


@pytest.mark.parametrize(
    "between",
    [
        no_nan,
        zero_nan,
        lambda h: h.relu().where(h == h, 0.0),
        lambda h: torch.nan_to_num(h.relu()),
        lambda h: h.relu() if h.isfinite().all() else h,
    ],
)
def test_code_that_looks_for_nan_does_not_hide_units(between):
    assert names(Net(between)) == ["a", "b"]


class Spiking(nn.Module):
    def __init__(self):
        super().__init__()
        self.potential = 0.0

    def forward(self, x):
        self.potential = 0.9 * self.potential + x.detach()
        return torch.sigmoid(4 * (self.potential - 1))


def test_state_between_calls_is_put_back():
    net = Net(nn.Identity())
    net.n1, net.n2 = Spiking(), Spiking()
    net.forward = lambda x: net.c(net.n2(net.b(net.n1(net.a(x)))))
    net.forward(torch.rand(3, 4))
    before = net.n1.potential.clone()
    sbp.count_macs(net, torch.rand(3, 4))
    assert torch.equal(net.n1.potential, before)
    plain = nn.Sequential(nn.Linear(4, 8), Spiking(), nn.Linear(8, 6), Spiking(), nn.Linear(6, 3))
    assert names(plain) == ["0", "2"]
    assert plain[1].potential == 0


SEEN: list = []
TOTAL = torch.zeros(8)


def test_what_hooks_of_the_user_record_stays_as_it_was():
    inner, count, kept = torch.zeros(8), 0, {}

    def closing(module, args, out):
        nonlocal count
        inner.add_(out.detach().mean(0))
        kept["last"] = out
        count += 1

    def outside(module, args, out):
        TOTAL.add_(out.detach().mean(0))
        SEEN.append(out)

    net, x = Net(torch.relu), torch.randn(3, 4)
    net.a.register_forward_hook(closing)
    net.a.register_forward_hook(outside)
    net(x)
    before = inner.clone(), TOTAL.clone(), count, len(SEEN), kept["last"]
    with pytest.warns(UserWarning, match="forward hooks of Net cannot be called"):
        small = pruned(net, x)
    assert torch.equal(inner, before[0]) and torch.equal(TOTAL, before[1])
    assert (count, len(SEEN)) == before[2:4] and kept["last"] is before[4]
    assert small.a.out_features == 5 and small(x).isfinite().all()


def test_hooks_that_change_the_output_are_part_of_the_network():
    net, x = Net(torch.relu), torch.randn(3, 4)
    net.b.register_forward_hook(lambda module, args, out: out * 2 + 1)
    small = pruned(net, x)
    assert len(small.b._forward_hooks) == 1 and small.b.out_features == 5


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 9), nn.Linear(9, 3)
        self.lock, self.features, self.all = threading.Lock(), None, []

    def forward(self, x):
        self.features = self.a(x).relu()
        self.all.append({"x": self.features})
        return self.b(self.features)


def test_a_network_that_keeps_features_and_a_lock_is_pruned():
    net, x = Keeps(), torch.randn(3, 4)
    net(x).sum().backward()
    small = pruned(net, x)
    assert small.a.out_features == 6 and small.lock is net.lock
    assert net.features.grad_fn is not None and len(net.all) == 1


def test_weight_norm_by_a_hook_can_be_copied():
    with pytest.warns(FutureWarning):
        first = torch.nn.utils.weight_norm(nn.Linear(4, 8))
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    assert "2" in names(net)


class Single(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("there is only one\nof this")


def test_a_network_that_refuses_to_be_copied_is_refused_at_once_with_the_reason():
    net = nn.Sequential(nn.Linear(4, 8), Single(8, 3))
    with pytest.raises(ValueError, match=r"Sequential cannot be copied.*'1': there is only one$"):
        sbp.find_gates(net, torch.randn(3, 4))


class Deformable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.off = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 18, 3, padding=1)
        self.d, self.b = DeformConv2d(8, 10, 3, padding=1), nn.Conv2d(10, 6, 3, padding=1)
        self.h = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x):
        x = self.a(x).relu()
        return self.h(self.b(self.d(x, self.off(x)).relu()).relu())


class Warped(nn.Module):
    """Reads an image at places that it computes (a spatial transformer network)."""

    def __init__(self):
        super().__init__()
        self.where, self.theta = nn.Linear(12, 8), nn.Linear(8, 6)
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        theta = self.theta(self.where(x.mean(-1).flatten(1)).relu()).view(-1, 2, 3)
        grid = F.affine_grid(theta, x.shape, align_corners=False)
        return self.b(self.a(F.grid_sample(x, grid, "nearest", align_corners=False)).relu())


def test_places_that_are_computed_are_never_nan():
    assert names(Deformable(), torch.randn(2, 3, 8, 8)) == ["b"]
    assert names(Warped(), torch.randn(2, 3, 4, 4)) == ["where", "a"]


def test_functions_that_refuse_nan_answer_nan():
    def inverted(h):
        square = torch.eye(8)[: h.shape[-1], : h.shape[-1]] + 0 * h.mean()
        return h.relu() @ torch.linalg.inv(square)

    gates = sbp.find_gates(Net(inverted), torch.randn(3, 4))
    assert gates == [] and gates.not_prunable["a"].startswith("several of its units reach")
    counted = sbp.find_gates(Net(lambda h: h.relu() + int(h.sum())), torch.randn(3, 4))
    assert "fails on NaN" in counted.not_prunable["a"]


def test_a_loop_that_does_not_end_on_nan_is_ended():
    def settle(h):
        y = h.relu()
        while not bool((y.abs() <= 1).all()):
            y = y / 2
        return y

    gates = sbp.find_gates(Net(settle), torch.randn(3, 4))
    assert gates.not_prunable["a"].endswith("a loop of the network does not end on NaN")


@pytest.mark.parametrize(
    "between",
    [
        lambda h: F.dropout(input=h.relu(), p=0.3, training=True),
        lambda h: h.relu() * (torch.rand_like(h) < 0.7),
        lambda h: h.relu() + torch.normal(0.0, 1.0, h.shape),
        lambda h: h.relu() * torch.bernoulli(torch.full_like(h, 0.5)),
        lambda h: h.relu() * torch.distributions.Normal(0.0, 1.0).sample(h.shape),
    ],
)
def test_noise_of_the_width_does_not_hide_units(between):
    net, x = Net(between), torch.randn(3, 4)
    assert names(net) == ["a", "b"]
    assert pruned(net, x).a.out_features == 5


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h.float().relu(),
        lambda h: h.to(torch.float32).relu(),
        lambda h: h.type("torch.FloatTensor").sigmoid(),
        lambda h: torch.relu(h) * torch.ones(h.shape[-1], dtype=torch.float32),
    ],
)
def test_casts_to_float32_are_proven_in_float64(between):
    net, x = Net(between), torch.randn(3, 4)
    assert names(net) == ["a", "b"]
    assert pruned(net, x).a.out_features == 5


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift, self.p, self.q = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 15, 1), nn.Conv1d(15, 1, 1)
        self.w = nn.Parameter(torch.randn(8, 8, 4, dtype=torch.cfloat) / 8)

    def forward(self, x):
        z = torch.fft.rfft(self.lift(x))
        z = torch.einsum("bix,iox->box", z[..., :4], self.w)
        return self.q(self.p(torch.fft.irfft(z, n=x.shape[-1])).relu())


def test_complex_parameters_stay_complex():
    net, x = Spectral(), torch.randn(2, 2, 16)
    assert names(net, x) == ["p"]
    small = pruned(net, x)
    assert small.p.out_channels == 10 and torch.equal(small.w, net.w)


def test_ties_are_decided_alike_and_other_choices_are_not():
    def top(*scores):
        return torch.tensor(scores, dtype=torch.float64).topk(2).indices.tolist()

    decisions = Decisions()
    with decisions.recorded():
        chosen = top(1.0, 1.0 + 1e-15, 3.0), top(1.0, 2.0, 3.0)
    with decisions.repeated():
        tied, other = top(1.0 + 1e-15, 1.0, 3.0), top(2.0, 1.0, 3.0)
    assert tied == chosen[0] == [2, 1]
    assert other == [2, 0] != chosen[1]


class Routed(nn.Module):
    """Weights two of four experts, and scales their weights in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.router = nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        h = self.a(x).relu()
        weights, chosen = self.router(h).softmax(-1).topk(2)
        weights.mul_(2.5)
        return self.b(h) + (weights[..., None] * self.experts[chosen]).sum(-2)


def test_a_network_may_change_the_values_of_its_choices_in_place():
    net, x = Routed(), torch.randn(6, 5)
    gates = sbp.find_gates(net, x)
    assert [gate.name for gate in gates] == ["a"], gates.reasons()
    theta = {"a": (torch.arange(8) > 2).float()}
    small = sbp.shrink(net, gates, theta, x)
    with torch.no_grad():
        masked = sbp.GatedNetwork(net, gates)(x, theta)
        torch.testing.assert_close(small(x), masked)


def test_recorded_choices_are_copies():
    x = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    decisions = Decisions()
    for context in (decisions.recorded, decisions.repeated, decisions.repeated):
        with context():
            values, indices = x.topk(2)
            assert values.tolist() == [3, 2] and indices.tolist() == [1, 2]
            values.zero_()
            indices.zero_()


class InPlace(nn.Module):
    """Normalises its input in place, and writes two layers into one tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x.sub_(0.5).div_(0.25)
        h = x.new_zeros(len(x), self.a.out_features)
        h += self.a(x)
        h.relu_()
        h[:, :] += self.b(x).relu_()
        return self.c(h)


def test_inputs_are_not_changed_in_place_and_tensors_inside_are_put_back():
    net, x = InPlace(), torch.rand(3, 4)
    before = x.clone()
    (gate,) = sbp.find_gates(net, x)
    assert [span.layer for span in gate.writers] == ["a", "b"]
    theta = {gate.name: (torch.arange(6) > 1).float()}
    small = sbp.shrink(net, [gate], theta, x)
    sbp.count_macs(net, x)
    sbp.benchmark(net, small, x, batch_sizes=(2,), seconds=0.01)
    assert torch.equal(x, before)
    with torch.no_grad():
        masked = sbp.GatedNetwork(net, [gate])(x.clone(), theta)
        torch.testing.assert_close(small(x.clone()), masked)


def test_lazy_layers_are_created_first():
    net, x = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3)), torch.randn(3, 4)
    assert names(net, x) == ["0"]
    assert pruned(net, x)[0].out_features == 5


def test_compiled_networks_are_measured_as_they_are_written():
    compiled = []

    def backend(graph, example):
        compiled.append(graph)
        return graph

    net = torch.compile(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), backend=backend)
    x = torch.randn(3, 4)
    (gate,) = sbp.find_gates(net, x)
    assert gate.name == "_orig_mod.0" and compiled == []
    for seed in range(2):
        torch.manual_seed(seed)
        theta = {gate.name: torch.rand(8) * (torch.arange(8) > seed)}
        small = sbp.shrink(net, [gate], theta, x)
        torch.testing.assert_close(sbp.GatedNetwork(net, [gate])(x, theta), small(x))


def test_a_network_in_several_processes_is_copied(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(Net(torch.relu))
        assert names(net) == ["module.a", "module.b"]
    finally:
        torch.distributed.destroy_process_group()
