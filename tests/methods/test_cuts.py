"""Cuts on the way: SBP removes units while the noise of the others is trained."""

from __future__ import annotations

import pytest
import torch

from pyro_sbp import networks
from pyro_sbp.methods.sbp import SBP
from pyro_sbp.methods.turn_phase import CUT_SHARE, TurnPhase
from pyro_sbp.recipes import SBPRecipe


def method(**settings):
    torch.manual_seed(0)
    recipe = SBPRecipe(dense_epochs=0, finetune_epochs=0, **settings)
    return SBP(networks.LeNet5(), torch.rand(8, 1, 28, 28), recipe, 100, ("fc1",))


def set_snr(phase: TurnPhase, low_units: int) -> None:
    """Give the first units of every gate a small signal-to-noise ratio, and the others a large."""
    with torch.no_grad():
        for name, log_scale in phase.guide.log_scales.named_parameters():
            log_scale.fill_(-3.0)
            log_scale[:low_units] = 5.0  # nearly the log-uniform prior
            assert name


@pytest.mark.parametrize(
    ("settings", "epochs", "schedules"),
    [
        ({"epochs": 5}, [5], [None]),
        ({"epochs": 6, "cut_every": 2}, [2, 2, 2], [(0, 6), (2, 6), (4, 6)]),
        ({"epochs": 7, "cut_every": 3}, [3, 3, 1], [(0, 7), (3, 7), (6, 7)]),
        (
            {"epochs": 9, "cut_every": 3, "kl_free_epochs": 1, "kl_rising_epochs": 2},
            [1, 2, 3, 3],
            [None, None, (0, 6), (3, 6)],
        ),
    ],
)
def test_the_epochs_are_divided_and_share_one_schedule(settings, epochs, schedules):
    phases = []
    for phase in method(**settings).noise():
        phases.append(phase)
        phase.finish()
    assert [phase.epochs for phase in phases] == epochs
    assert [phase.schedule_span if phase.decays else None for phase in phases] == schedules
    assert len({phase.name for phase in phases}) == len(phases)
    # Batch norms are recalibrated when the noise is folded in, after the last cut.
    assert [phase.folds for phase in phases if phase.ends][-1]
    assert sum(phase.folds for phase in phases if phase.ends) == 1


def test_units_far_under_the_threshold_leave_and_the_noise_of_the_others_goes_on():
    sbp = method(epochs=4, cut_every=2, init_log_scale=-3.0, macs_weight=1.0)
    first, second = None, None
    for phase in sbp.noise():
        if first is None:
            first = phase
            set_snr(first, low_units=5)
            with torch.no_grad():
                first.guide.get_parameter("locs.conv2_unconstrained")[5:] = -0.5
            before = {name: q.loc.detach().clone() for name, q in first.guide.posteriors().items()}
        else:
            second = phase
            # Read before the end of the turn, which cuts the network.
            after = {name: q.loc.detach().clone() for name, q in second.guide.posteriors().items()}
            sizes = {gate.name: gate.size for gate in second.stage.gates}
        phase.finish()
    assert isinstance(first, TurnPhase) and isinstance(second, TurnPhase)
    assert sizes == {"conv1": 15, "conv2": 45, "fc1_input": 720, "fc1": 495}
    torch.testing.assert_close(after["conv2"], before["conv2"][5:])
    assert float(after["conv2"].max()) == -0.5
    # The mean is not folded into the weights before the last cut.
    torch.testing.assert_close(
        second.stage.net.get_parameter("fc2.weight"), sbp.net.get_parameter("fc2.weight")[:, 5:]
    )
    assert second.kl_scale == first.kl_scale
    assert int(sbp.units["conv1"].kept.sum()) == 15 and sbp.held == ()


def test_units_a_little_under_the_threshold_stay_until_the_end():
    sbp = method(epochs=4, cut_every=2, threshold=1.0)
    phases = sbp.noise()
    first = next(phases)
    assert isinstance(first, TurnPhase)
    with torch.no_grad():
        # SNR 0.58: under the threshold, over half of it.
        first.guide.get_parameter("log_scales.fc1_unconstrained")[:7] = 1.0
        first.guide.get_parameter("locs.fc1_unconstrained")[:7] = -2.0
    snr = first.guide.snr()["fc1"][:7]
    assert float(snr.min()) > CUT_SHARE and float(snr.max()) < 1
    assert first.standing().units["fc1"] == 493
    first.finish()
    second = next(phases)
    assert second.standing().units["fc1"] == 493
    assert {gate.name: gate.size for gate in second.stage.gates}["fc1"] == 500
    second.finish()
    assert int(sbp.units["fc1"].kept.sum()) == 493


def test_rounding_after_a_cut_removes_the_weakest_units_of_the_last_turn():
    sbp = method(epochs=4, cut_every=2, init_log_scale=-3.0)
    phases = sbp.noise()
    first = next(phases)
    set_snr(first, low_units=14)
    first.finish()
    second = next(phases)
    with torch.no_grad():
        # The six units that are left of conv1 have rising signal-to-noise ratios.
        second.guide.get_parameter("log_scales.conv1_unconstrained").copy_(
            torch.linspace(-2.5, -5.0, 6)
        )
    second.finish()
    assert int(sbp.units["conv1"].kept.sum()) == 6
    sbp.prune(threshold=1.0, round_to=4)
    assert sbp.units["conv1"].kept.nonzero().flatten().tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize(("cut_every", "state"), [(2, "guide"), (0, "module")])
def test_an_ended_turn_is_restored_with_the_units_that_it_kept(cut_every, state):
    """A turn before the last one, and the last turn."""
    sbp = method(epochs=4, cut_every=cut_every, init_log_scale=-3.0)
    first = next(sbp.noise())
    set_snr(first, low_units=5)
    first.finish()
    record = first.record()
    units = dict(sbp.units)

    other = method(epochs=4, cut_every=cut_every, init_log_scale=-3.0)
    again = next(other.noise())
    # As on a machine on which the signal-to-noise ratios come to the other side of the threshold.
    record[state] = {name: value + 20 * ("log_scales.conv1" in name)
                     for name, value in record[state].items()}  # fmt: skip
    assert again.restore(record) is (state == "module")
    assert (
        other.units == units and other.small.fc1.in_features == units["fc1_input"].remaining.sum()
    )


@pytest.mark.parametrize(("threshold", "left"), [(None, 15), (-1.0, 20)])
def test_no_unit_over_the_threshold_leaves_on_the_way_by_any_criterion(threshold, left):
    settings = {} if threshold is None else {"threshold": threshold}
    phases = method(epochs=4, cut_every=2, criterion="bmrs-n", **settings).noise()
    first = next(phases)
    assert isinstance(first, TurnPhase)
    with torch.no_grad():
        # A half-normal at the lower bound: a score of -0.77, under half of both thresholds.
        first.guide.get_parameter("log_scales.conv1_unconstrained")[:5] = 2.0
        first.guide.get_parameter("locs.conv1_unconstrained")[:5] = -20.0
    assert first.scores("bmrs-n")["conv1"][:5].tolist() == pytest.approx([-0.77] * 5, abs=0.02)
    first.finish()
    second = next(phases)
    assert {gate.name: gate.size for gate in second.stage.gates}["conv1"] == left
