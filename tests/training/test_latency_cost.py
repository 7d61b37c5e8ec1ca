"""Runs whose KL divergence is weighted by the measured latency of the units."""

import functools
import json

import pytest
import torch

from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.deployment.unit_latency import UnitLatency
from pyro_sbp.errors import RequestError
from pyro_sbp.methods import gated, turn_phase
from pyro_sbp.methods.sbp import SBP
from pyro_sbp.recipes import RBPRecipe, Request, SBPRecipe, SparseVDRecipe
from pyro_sbp.training.again import prune_again
from pyro_sbp.training.latency_file import NAME, read_unit_latency
from pyro_sbp.training.loop import Interrupted, Loop
from pyro_sbp.training.train import train

SHORT = {"dense_epochs": 1, "epochs": 3, "finetune_epochs": 0, "batch_size": 256}


@pytest.fixture
def calls(monkeypatch):
    """A measurement that finds each unit of a later gate a millisecond slower."""
    found = []

    def measured(net, gates, x, *, batch_size):
        found.append(x.shape)
        milliseconds = {
            gate.name: [(1, 100.0 - (place + 1) * (gate.size - 1)), (gate.size, 100.0)]
            for place, gate in enumerate(gates)
        }
        sizes = {gate.name: gate.size for gate in gates}
        return UnitLatency(sizes, milliseconds, batch_size, 1, "cpu")

    monkeypatch.setattr(gated, "measure_unit_latency", measured)
    return found


@pytest.mark.parametrize("recipe", [SBPRecipe, RBPRecipe])
def test_a_run_weights_its_kl_by_the_latencies_that_it_measured_once(
    recipe, calls, tmp_path, monkeypatch
):
    request = Request(
        "lenet-300-100", "digits", recipe(cost="latency", macs_weight=2.0, **SHORT), seed=1
    )
    data = load_dataset("digits", image_size=28)
    scales = []
    original = turn_phase.GatedModel.__init__

    def kept(self, *args, **options):
        scales.append(options["kl_scale"])
        original(self, *args, **options)

    monkeypatch.setattr(turn_phase.GatedModel, "__init__", kept)
    whole = train(request, data, tmp_path / "whole")
    table = read_unit_latency(tmp_path / "whole")
    relative = table.relative()
    assert table.batch_size == 128 and len(set(relative.values())) == len(relative) > 1
    assert {name: scale for given in scales for name, scale in given.items()} == {
        name: pytest.approx(1 + 2 * cost) for name, cost in relative.items()
    }

    steps = 0

    def every_third_step():
        nonlocal steps
        steps += 1
        return steps % 3 == 0

    calls.clear()
    for _ in range(50):
        try:
            stopped = train(request, data, tmp_path / "stopped", stop=every_third_step)
            break
        except Interrupted:
            assert len(calls) == 1
    assert len(calls) == 1 and steps > 6
    assert stopped.units == whole.units and stopped.error == whole.error
    # Pruning again reads the file, too.
    again = prune_again(request, data, tmp_path / "whole", tmp_path / "again", threshold=0.0)
    assert len(calls) == 1 and again.macs.pruned <= again.macs.dense


def test_bad_requests_are_refused_in_a_line(calls, tmp_path):
    with pytest.raises(RequestError, match="has no effect, because macs_weight is 0"):
        SBPRecipe(cost="latency")
    with pytest.raises(RequestError, match="'cost' is a setting of sbp and rbp"):
        SparseVDRecipe.from_dict({"cost": "latency"}, "mine.toml")
    with pytest.raises(RequestError, match=f'no {NAME}; .* cost = "latency"'):
        read_unit_latency(tmp_path)
    (tmp_path / NAME).write_text(json.dumps({"sizes": {}}))
    with pytest.raises(RequestError, match=f"{NAME} cannot be read"):
        read_unit_latency(tmp_path)


def test_latencies_that_do_not_depend_on_the_units_end_the_run_before_training(
    tmp_path, monkeypatch
):
    def flat(net, gates, x, *, batch_size):
        sizes = {gate.name: gate.size for gate in gates}
        pairs = {gate.name: [(1, 5.0), (gate.size, 5.0)] for gate in gates}
        return UnitLatency(sizes, pairs, batch_size, 1, "cpu")

    monkeypatch.setattr(gated, "measure_unit_latency", flat)
    monkeypatch.setattr(Loop, "train", lambda *args: pytest.fail("it was trained"))
    recipe = SBPRecipe(cost="latency", macs_weight=1.0, **SHORT)
    with pytest.raises(RequestError, match="does not depend on the units of any gate"):
        train(
            Request("lenet-300-100", "digits", recipe),
            load_dataset("digits", image_size=28),
            tmp_path / "run",
        )


def test_a_method_measures_at_the_batch_size_of_the_recipe(monkeypatch):
    quick = functools.partial(gated.measure_unit_latency, seconds=0.01)
    monkeypatch.setattr(gated, "measure_unit_latency", quick)
    recipe = SBPRecipe(cost="latency", macs_weight=1.0, cost_batch_size=2, **SHORT)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    net = torch.nn.Sequential(net, torch.nn.Flatten())
    x = torch.randn(2, 1, 6, 6)
    method = SBP(net, x, recipe, 10, ())
    found = method.measure_latency(x)
    assert found.batch_size == 2 and list(found.sizes.values()) == [4]
