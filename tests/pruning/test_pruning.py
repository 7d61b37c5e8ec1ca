"""prune: from the posterior to a smaller network that was checked."""

import copy

import pyro
import pytest
import torch

import pyro_sbp as sbp
from pyro_sbp.gates import folding, surgery
from pyro_sbp.pruning import choosing
from pyro_sbp.pruning.budgets import MacsRatio
from pyro_sbp.pruning.choosing import choose_units
from pyro_sbp.pruning.exactness import EquivalenceError, checked_shrink
from pyro_sbp.pruning.macs import count_macs


@pytest.fixture
def lenet():
    pyro.set_rng_seed(0)
    net = sbp.networks.LeNet5()
    x = torch.rand(3, 1, 28, 28)
    model = sbp.GatedModel(net, sbp.find_gates(net, x, ["fc1"]), num_data=100)
    guide = sbp.TruncatedLogNormalGuide(model)
    with torch.no_grad():
        for loc, log_scale in zip(
            guide.locs.parameters(), guide.log_scales.parameters(), strict=True
        ):
            loc.uniform_(-2.0, 0.0)
            log_scale.uniform_(-4.0, 2.0)
    return model, guide, x


def test_units_under_the_threshold_are_gone_and_the_rest_is_folded_in(lenet):
    model, guide, x = lenet
    small = sbp.prune(model, guide, x, threshold=1.0)
    theta = {name: mean * (guide.snr()[name] >= 1) for name, mean in guide.mean().items()}
    torch.testing.assert_close(small(x), model.gated(x, theta), rtol=1e-5, atol=1e-6)
    kept = int((guide.snr()["conv1"] >= 1).sum())
    assert 0 < kept < 20 and small.conv1.out_channels == kept


def test_the_result_is_a_plain_network(lenet):
    model, guide, x = lenet
    small = sbp.prune(model, guide, x)
    assert type(small) is sbp.networks.LeNet5
    modules = list(small.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not any("pyro." in type(m).__module__ for m in modules)
    assert all(parameter.dtype == torch.float32 for parameter in small.parameters())


def test_a_higher_threshold_keeps_less(lenet):
    model, guide, x = lenet
    sizes = [
        sum(p.numel() for p in sbp.prune(model, guide, x, threshold=t).parameters())
        for t in (0.0, 1.0, 5.0)
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[0] == sum(p.numel() for p in model.gated.net.parameters())


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_none_is_refused(lenet, threshold):
    model, guide, x = lenet
    with pytest.raises(ValueError, match="expected a signal-to-noise ratio >= 0"):
        sbp.prune(model, guide, x, threshold=threshold)


def test_a_broken_fold_is_refused(lenet, monkeypatch):
    """Both rooms that fold get the same wrong fold; the masked network does not fold."""
    model, guide, x = lenet
    factors = folding.factors

    def broken(net, gates, theta):
        for name, weight, factor in factors(net, gates, theta):
            yield name, weight, factor * (1 + 1e-8)

    for module in (folding, surgery):
        monkeypatch.setattr(module, "factors", broken)
    with pytest.raises(EquivalenceError, match="differs from the masked one by"):
        sbp.prune(model, guide, x)


def test_a_unit_removed_too_many_is_refused(lenet, monkeypatch):
    model, guide, x = lenet
    original = surgery.surviving_units

    def wrong(gates, theta, **options):
        units = original(gates, theta, **options)
        kept = units["fc1"].kept.clone()
        kept[torch.nonzero(kept)[0]] = False
        return {**units, "fc1": surgery.Units(kept, kept)}

    monkeypatch.setattr(choosing, "surviving_units", wrong)
    with pytest.raises(EquivalenceError):
        sbp.prune(model, guide, x)


def test_the_difference_is_measured_on_what_is_handed_over(lenet):
    model, guide, x = lenet
    theta = {name: mean * (guide.snr()[name] >= 1) for name, mean in guide.mean().items()}
    small, check = checked_shrink(model.gated.net, model.gates, theta, x)
    expected = (model.gated(x, theta) - small(x)).abs().max()
    assert check.max_rel_diff_float64 <= 1e-12
    # Folding rounds once more than multiplying activations does.
    assert check.max_abs_diff <= 1e-4 and float(expected.detach()) <= 1e-4


@pytest.mark.parametrize("ratio", [1.0, 3.0, 20.0])
def test_a_budget_is_met_with_the_lowest_threshold(lenet, ratio):
    model, guide, x = lenet
    dense = count_macs(model.gated.net, x[:1])
    small = sbp.prune(model, guide, x, macs_ratio=ratio)
    assert dense / count_macs(small, x[:1]) >= ratio
    choice = choose_units(
        model.gated.net, model.gates, guide.mean(), guide.snr(), x, budget=MacsRatio(ratio)
    )
    levels = torch.cat(list(guide.snr().values())).unique()
    below = levels[levels < choice.threshold]
    if len(below):
        more = sbp.prune(model, guide, x, threshold=float(below[-1]))
        assert dense / count_macs(more, x[:1]) < ratio


def test_a_budget_that_cannot_be_met_says_what_can(lenet):
    model, guide, x = lenet
    with pytest.raises(ValueError, match=r"macs_ratio 1e\+06 cannot be met.* times fewer"):
        sbp.prune(model, guide, x, macs_ratio=1e6)
    with pytest.raises(ValueError, match="expected a number >= 1"):
        sbp.prune(model, guide, x, macs_ratio=0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": "2"}, "threshold is '2'; expected a number"),
        ({"threshold": [1.0]}, r"threshold is \[1.0\]; expected a number"),
        ({"macs_ratio": "2"}, "macs_ratio is '2'; expected a number"),
        ({"round_to": 8.0}, "round_to is 8.0; expected an integer >= 1"),
        ({"round_to": "8"}, "round_to is '8'; expected an integer >= 1"),
        ({"min_units": None}, "min_units is None; expected an integer >= 0"),
    ],
)
def test_settings_of_a_wrong_type_are_refused(lenet, settings, words):
    model, guide, x = lenet
    with pytest.raises(ValueError, match=words):
        sbp.prune(model, guide, x, **settings)


def test_a_threshold_may_be_a_tensor(lenet):
    model, guide, x = lenet
    small = sbp.prune(model, guide, x, threshold=torch.tensor(3.0))
    assert small.conv1.out_channels == sbp.prune(model, guide, x, 3).conv1.out_channels


def test_over_all_units_every_gate_keeps_its_best_and_a_warning_says_so(lenet):
    model, guide, x = lenet
    largest = max(float(snr.max()) for snr in guide.snr().values())
    with pytest.warns(UserWarning, match=f"no unit reaches the threshold.* is {largest:.4g}"):
        small = sbp.prune(model, guide, x, threshold=2 * largest)
    assert small.conv1.out_channels == small.conv2.out_channels == small.fc1[-1].out_features == 1
    with pytest.raises(ValueError, match=f"min_units 0 removes every unit.* is {largest:.4g}"):
        sbp.prune(model, guide, x, threshold=2 * largest, min_units=0)


def test_counts_are_rounded_up_with_the_best_of_the_rest(lenet):
    model, guide, x = lenet
    small = sbp.prune(model, guide, x, threshold=3.0, round_to=8)
    assert small.conv1.out_channels % 8 == 0 or small.conv1.out_channels == 20
    assert small.conv2.out_channels % 8 == 0 and small.fc1[-1].out_features % 8 == 0
    options = {"threshold": 3.0, "round_to": 8}
    choice = choose_units(model.gated.net, model.gates, guide.mean(), guide.snr(), x, **options)
    snr, kept = guide.snr()["fc1"], choice.units["fc1"].kept
    count = int((snr >= 3.0).sum())
    assert kept.sum() == -(-count // 8) * 8
    assert torch.equal(kept.nonzero().flatten().sort()[0], snr.topk(int(kept.sum()))[1].sort()[0])
    assert not choice.units["fc1"].zeroed.any()


def test_every_gate_keeps_its_best_unit(lenet):
    model, guide, x = lenet
    with torch.no_grad():
        guide.locs.conv1.fill_(-18.0)
        guide.log_scales.conv1.fill_(4.0)
        guide.log_scales.conv1[7] = 3.5
    assert (guide.snr()["conv1"] < 1).all()
    small = sbp.prune(model, guide, x)
    assert small.conv1.out_channels == 1
    channel = guide.snr()["conv1"].argmax()
    assert torch.equal(small.conv1.weight[0], model.gated.net.conv1.weight[channel])
    assert sbp.prune(model, guide, x, min_units=5).conv1.out_channels == 5

    nothing = sbp.prune(model, guide, x, min_units=0)
    assert nothing.conv1.out_channels == 1
    # Outputs are about 0.04. The rows of a batch may be rounded differently.
    assert rows_apart(small, x) > 1e-7 and rows_apart(nothing, x) < 1e-15


def rows_apart(net, x):
    rows = copy.deepcopy(net).double()(x.double()).detach()
    return float((rows[0] - rows[1]).abs().max())


@pytest.mark.parametrize("options", [{"round_to": 0}, {"min_units": -1}])
def test_settings_out_of_range_are_refused(lenet, options):
    model, guide, x = lenet
    with pytest.raises(ValueError, match="expected an integer >= "):
        sbp.prune(model, guide, x, **options)


def test_a_threshold_and_a_budget_together_are_refused(lenet):
    model, guide, x = lenet
    with pytest.raises(ValueError, match="not both"):
        sbp.prune(model, guide, x, threshold=1.0, macs_ratio=2.0)
