"""shrink: the smaller network computes what the masked one computes."""

import pytest
import torch

from pyro_sbp import networks
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.layers import Select
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import relative_difference, shrink, surviving_units
from pyro_sbp.pruning.macs import count_macs


def random_theta(gates, seed=0, share=0.5):
    torch.manual_seed(seed)
    return {
        gate.name: torch.rand(gate.size, dtype=torch.float64) * (torch.rand(gate.size) > share)
        for gate in gates
    }


def narrow_vgg():
    return networks.VGGLike(width=8)


@pytest.mark.parametrize(
    ("make", "shape", "features"),
    [
        (networks.LeNet5, (1, 28, 28), ["fc1"]),
        (networks.LeNet500_300, (1, 28, 28), ["fc1"]),
        (narrow_vgg, (3, 32, 32), []),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_pruned_equals_masked(make, shape, features, share):
    torch.manual_seed(1)
    net = make().double().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.bias.data.normal_()
    x = torch.randn(2, *shape, dtype=torch.float64)
    gates = find_gates(net, x, features)
    theta = random_theta(gates, share=share)
    small = shrink(net, gates, theta, x)
    assert relative_difference(GatedNetwork(net, gates)(x, theta), small(x)) <= 1e-12
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in small.modules())


@pytest.fixture
def lenet():
    torch.manual_seed(0)
    net = networks.LeNet5().double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    gates = find_gates(net, x, ["fc1"])
    return net, x, gates, {gate.name: torch.ones(gate.size).double() for gate in gates}


def test_a_channel_whose_features_are_all_gone_goes_too(lenet):
    net, x, gates, theta = lenet
    theta["fc1_input"][16 * 7 : 16 * 8] = 0
    theta["fc1_input"][3] = 0
    units = surviving_units(gates, theta)
    assert units["conv2"].kept.sum() == 49 and not units["conv2"].kept[7]
    small = shrink(net, gates, theta, x)
    assert small.conv2.out_channels == 49
    assert isinstance(small.fc1.select, Select) and len(small.fc1.select.index) == 783
    assert small.fc1.layer.in_features == 783


def test_the_features_of_a_channel_that_is_gone_go_too(lenet):
    net, x, gates, theta = lenet
    theta["conv2"][[0, 5]] = 0
    assert surviving_units(gates, theta)["fc1_input"].kept.sum() == 48 * 16
    small = shrink(net, gates, theta, x)
    assert small.fc1.in_features == 768
    assert not isinstance(small.fc1, torch.nn.Sequential)


def test_nothing_kept_leaves_one_column_of_zeros(lenet):
    net, x, gates, theta = lenet
    theta["conv1"][:] = 0
    units = surviving_units(gates, theta)["conv1"]
    assert units.kept.sum() == 0 and units.zeroed.sum() == 1 and units.removed.sum() == 19
    small = shrink(net, gates, theta, x)
    assert small.conv1.out_channels == 1
    assert torch.allclose(small(x)[0], small(x)[1]), "nothing of the input is left"


def test_theta_for_every_example_is_refused(lenet):
    net, x, gates, _ = lenet
    with pytest.raises(ValueError, match=r"theta of gate 'conv1' .*\[2, 20\]; expected \[20\]$"):
        shrink(net, gates, {"conv1": torch.ones(2, 20)}, x)


def test_the_original_and_its_mode_stay(lenet):
    net, x, gates, theta = lenet
    theta["conv1"][3:] = 0
    before = {name: value.clone() for name, value in net.state_dict().items()}
    small = shrink(net.train(), gates, theta, x)
    assert small.training and net.training and net.conv1.out_channels == 20
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_macs_are_those_of_the_kept_units(lenet):
    net, x, gates, theta = lenet
    theta["conv1"][3:] = 0
    theta["conv2"][18:] = 0
    theta["fc1"][283:] = 0
    theta["fc1_input"][284:] = 0
    macs = count_macs(shrink(net, gates, theta, x), x[:1])
    assert macs == 24**2 * 25 * 3 + 8**2 * 25 * 3 * 18 + 284 * 283 + 283 * 10
    assert count_macs(net, x[:1]) == 24**2 * 25 * 20 + 8**2 * 25 * 20 * 50 + 800 * 500 + 500 * 10
    # The published units of SBP on LeNet-5 (arXiv 1705.07283, table 1), MACs recomputed.
    assert count_macs(net, x[:1]) / macs == pytest.approx(10.78, abs=0.005)


def test_a_nan_anywhere_is_a_difference():
    one, nan = torch.ones(1), torch.full((1,), torch.nan)
    assert not relative_difference((one, one), (one, nan)) <= 1e-10
    assert not relative_difference((one, one), (nan, one)) <= 1e-10


class _Permuted(torch.nn.Module):
    """Flattens with the channels last but one, in another order."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.fc = torch.nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.conv(x).flip(1).flatten(1))


def test_what_stays_of_two_gates_that_lost_all_units_is_joined():
    net = _Permuted().double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    gates = find_gates(net, x, ["fc"])
    theta = {gate.name: torch.zeros(gate.size, dtype=torch.float64) for gate in gates}
    small = shrink(net, gates, theta, x)
    assert small.conv.out_channels == 1 and small.fc.layer.in_features == 1
    assert torch.allclose(small(x), net.fc.bias)


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_each_output_is_compared_on_its_own_scale():
    a = float64(1.0, -1e9, -torch.inf, 0.0)
    b = a.clone()
    assert relative_difference((a, a[:1]), (b, b[:1])) == 0
    b[0] += 0.1
    assert relative_difference(a, b) == pytest.approx(0.1)
    assert relative_difference((a, a[:1]), (a, b[:1])) == pytest.approx(0.1)
    b = a * (1 + 1e-15)
    assert 0 < relative_difference(a, b) < 1e-14
    for other in (a[:3], a.clone().fill_(-torch.inf)):
        assert relative_difference(a, other) == float("inf")
    assert relative_difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    assert relative_difference(a > 0, a > 0) == 0
    with pytest.raises(ValueError, match="no tensor"):
        relative_difference((), ())


@pytest.mark.parametrize(
    "huge",
    [-1e9, torch.finfo(torch.float32).min, torch.finfo(torch.float64).min, -torch.inf],
)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("error", [1e-6, 1e-3, 1.0])
def test_masks_hide_no_difference(huge, share, error):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 25, generator=generator, dtype=torch.float64)
    masked = torch.rand(4, 25, generator=generator) < share
    b = torch.where(masked, huge, a * (1 + error))
    a = torch.where(masked, huge, a)
    assert error / 3 < relative_difference(a, b) <= 2 * error


def test_a_huge_value_that_is_rounded_differently_hides_no_difference():
    for rounding in (1e-16, 1e-13):
        a = float64(1e9, 0.5, 1.0)
        b = float64(1e9 * (1 + rounding), 0.5, 1.0 + 1e-6)
        assert relative_difference(a, b) == pytest.approx(1e-6)
        # As many values of another size as of an ordinary one: an output in two units.
        a, b = float64(1e9, 1.0), float64(1e9 * (1 + rounding), 1.0 + 1e-6)
        assert relative_difference(a, b) == pytest.approx(1e-6)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e3, 1e6])
def test_rounding_of_values_near_zero_is_no_difference(size):
    generator = torch.Generator().manual_seed(0)
    a = size * torch.randn(100, generator=generator, dtype=torch.float64)
    a[::3] = 0  # but for cancellation
    noise = 1e-15 * size * torch.randn(100, generator=generator, dtype=torch.float64)
    assert relative_difference(a, a + noise) < 1e-14
    assert relative_difference(a + noise, a) < 1e-14


def test_rounding_near_zero_is_no_difference_where_all_else_is_equal():
    assert relative_difference(float64(1.0, 0.0), float64(1.0, 1e-16)) == pytest.approx(1e-16)
    assert relative_difference(float64(0.1, 1e-18), float64(0.1, 3e-18)) == pytest.approx(2e-17)
    # Most values are zero but for cancellation.
    a, b = float64(3.0, *[1e-16] * 9), float64(3.0, *[-1e-16] * 9)
    assert relative_difference(a, b) == pytest.approx(2e-16)


def test_small_outputs_are_compared_with_the_largest_of_them():
    a, b = float64(1e-20, 3e-21), float64(1e-20, 3.5e-21)
    assert relative_difference(a, b) == pytest.approx(0.05)
    assert relative_difference(float64(0.0), float64(1e-300)) == float("inf")
    assert relative_difference(float64(0.0), float64(0.0)) == 0
    assert relative_difference(a[:0], b[:0]) == 0


def test_numbers_of_other_kinds():
    a = torch.tensor([1 + 1j, 2.0], dtype=torch.complex128)
    assert relative_difference(a, a) == 0
    assert relative_difference(a, a + 0.1j) == pytest.approx(0.1 / 2**0.5)
    half = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert relative_difference(half, half * 1.01) == pytest.approx(0.0078125)
    assert relative_difference(torch.tensor([1]), torch.tensor([1.0])) == float("inf")
    assert relative_difference(float64(1.0), float64(torch.nan)) == float("inf")
    assert relative_difference(float64(torch.inf), float64(-torch.inf)) == float("inf")


class Masking(torch.nn.Module):
    """Its first logit is ruled out, as in many language models, and others follow a width."""

    def __init__(self):
        super().__init__()
        self.a, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        h = self.a(x).relu()
        h = h / (1 + 1e-6 * h.shape[1])
        mask = torch.tensor([True, False, False])
        return self.head(h).masked_fill(mask, torch.finfo(torch.float32).min)


def test_a_mask_of_the_smallest_number_does_not_prove_a_wrong_cut():
    gates = find_gates(Masking(), torch.randn(5, 4))
    assert gates == [] and "cutting it changes the output" in gates.not_prunable["a"]
