"""RBP: the order of the gates, what a turn does, and runs that are stopped and go on."""

import dataclasses
import json
import operator

import pyro
import pytest
import torch
from torch import nn

from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.deployment import loading
from pyro_sbp.errors import RequestError
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.methods.rbp import RBP, in_order
from pyro_sbp.methods.stage import Turn
from pyro_sbp.networks import LeNet5, LeNet300_100
from pyro_sbp.pruning.budgets import MacsRatio
from pyro_sbp.pruning.macs import count_macs
from pyro_sbp.recipes.method_recipes import RBPRecipe, SBPRecipe
from pyro_sbp.recipes.request import Request
from pyro_sbp.reports.posterior import describe, read_posterior
from pyro_sbp.training import again
from pyro_sbp.training import train as training
from pyro_sbp.training.checkpoints import Checkpoint
from pyro_sbp.training.loop import Interrupted
from pyro_sbp.training.runs import Run


class Residual(nn.Module):
    """A stream with two writers, batch norm, and a grouped convolution, for 8 x 8 images."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.a = nn.Conv2d(12, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 12, 3, padding=1, groups=2)
        self.fc = nn.Linear(12 * 16, 24)
        self.head = nn.Linear(24, num_classes)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.b(self.a(x).relu())
        return self.head(self.fc(x.relu().flatten(1)).relu())


class EarlySkip(nn.Module):
    """What is written first is read last."""

    def __init__(self):
        super().__init__()
        self.skip, self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 5), nn.Linear(5, 4)
        self.head = nn.Linear(7, 2)

    def forward(self, x):
        skip = self.skip(x)
        return self.head(torch.cat([skip, self.b(self.a(x).relu())], 1).relu())


@pytest.mark.parametrize(
    ("net", "shape", "features", "found", "order"),
    [
        (Residual(), (1, 8, 8), [], ["stem", "a", "fc"], ["stem", "a", "fc"]),
        (EarlySkip(), (6,), [], ["skip", "a", "b"], ["a", "skip", "b"]),
        (
            LeNet5(),
            (1, 28, 28),
            ["fc1"],
            ["conv1", "conv2", "fc1_input", "fc1"],
            ["conv1", "conv2", "fc1_input", "fc1"],
        ),
        (
            LeNet300_100(in_features=6),
            (6,),
            ["fc1", "fc3"],
            ["fc1_input", "fc1", "fc2", "fc3_input"],
            ["fc1_input", "fc1", "fc2", "fc3_input"],
        ),
    ],
)
def test_the_order_is_that_in_which_readers_are_called(net, shape, features, found, order):
    gates = find_gates(net, torch.randn(2, *shape), features)
    assert [gate.name for gate in gates] == found
    assert [gate.name for gate in in_order(gates)] == order


RECIPE = RBPRecipe(
    name="quick",
    dense_epochs=2,
    epochs=7,
    finetune_epochs=1,
    batch_size=64,
    noise_learning_rate=0.1,
    init_log_scale=-1.0,
    prior_scale=4.0,
    recalibrate=True,
    threshold=1.0,
    learning_rate=3e-3,
    kl_scale={"stem": 20.0, "a": 5.0, "fc": 2.0},
)
#: 1,438 images.
STEPS = 23


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def request(**changes):
    return Request("test_rbp:Residual", "digits", RECIPE.replace(**changes), seed=5)


def state_of(directory):
    return loading.load(directory / "pruned", constructor=Residual).state_dict()


def lines_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "seconds": 0} for line in lines]


def without_times(summary):
    return {key: value for key, value in summary.items() if key != "train_seconds"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    directory = tmp_path_factory.mktemp("runs") / "run"
    return directory, training.train(request(), digits, directory).to_dict()


def test_the_gates_take_turns_and_every_line_tells_all_units(finished):
    directory, summary = finished
    lines = lines_of(directory)
    turns = ["gate stem"] * 3 + ["gate a"] * 2 + ["gate fc"] * 2
    assert [line["phase"] for line in lines] == ["dense"] * 2 + turns + ["finetuned"]
    assert all(list(line["units"]) == ["stem", "a", "fc"] for line in lines)
    assert lines[1]["units"] == {"stem": 12, "a": 16, "fc": 24}
    # Until its turn a gate loses only what nobody reads any more; afterwards it loses no more.
    at_end = {line["phase"]: line["units"] for line in lines}
    assert at_end["gate stem"]["stem"] < 12 and at_end["gate stem"]["fc"] == 24
    assert at_end["gate a"]["a"] < 16 and at_end["gate fc"]["fc"] < 24
    assert at_end["gate fc"] == at_end["finetuned"]
    assert at_end["gate fc"] == {unit["gate"]: unit["kept"] for unit in summary["units"]}
    assert [unit["total"] for unit in summary["units"]] == [12, 16, 24]
    assert summary["equivalence"]["max_rel_diff_float64"] <= 1e-10
    assert summary["error"]["mean"] is not None and summary["error"]["pruned"] < 60


def test_the_units_of_the_summary_are_those_of_the_network(finished, digits):
    directory, summary = finished
    net = loading.load(directory / "pruned", constructor=Residual)
    there = {unit["gate"]: unit["kept"] + unit["zeroed"] for unit in summary["units"]}
    assert (net.stem.out_channels, net.b.out_channels) == (there["stem"], there["stem"])
    assert (net.a.in_channels, net.a.out_channels) == (there["stem"], there["a"])
    assert net.fc.in_features == 16 * there["stem"] and net.head.in_features == there["fc"]
    assert sum(p.numel() for p in net.parameters()) == summary["parameters"]["pruned"]
    units = json.loads((directory / "pruned" / "units.json").read_text())
    for name, unit in units.items():
        numbers = unit["kept"] + unit["zeroed"]
        assert len(set(numbers)) == there[name] and max(numbers) < unit["total"]
    x, y = digits.test.batch(slice(None))
    error = 100 * float((net(x).argmax(1) != y).float().mean())
    assert error == pytest.approx(summary["error"]["finetuned"], abs=1e-4)


def test_units_cost_what_the_network_that_is_left_has_for_them():
    torch.manual_seed(0)
    x = torch.rand(8, 1, 8, 8)
    recipe = RECIPE.replace(dense_epochs=0, macs_weight=2.0, init_log_scale=-9.0)
    method = RBP(Residual(), x, recipe, 100)
    labels = torch.zeros(8, dtype=torch.long)
    # MACs of a unit where so many of stem, a and fc are there; b has two groups.
    widths = [12, 16, 24]
    for name, phase in zip(("stem", "a", "fc"), method.noise(), strict=True):
        stem, a, fc = widths
        costs = [
            16 * 9 + 16 * 9 * a + 16 * 9 * a / 2 + 16 * fc,
            16 * 9 * stem + 16 * 9 * stem / 2,
            16 * stem + 10,
        ]
        mean = sum(map(operator.mul, costs, widths)) / sum(widths)
        index = ("stem", "a", "fc").index(name)
        guide = phase.guide
        weight = recipe.kl_scale[name] * (1 + 2 * costs[index] / mean)
        kl = float(guide.kl()[name].sum())
        assert phase.loss(x, labels).kl.item() == pytest.approx(weight * kl / 100, rel=1e-4)
        # Without noise to speak of, all units that are there stay.
        phase.module.eval()
        assert phase.standing().macs == pytest.approx(count_macs(phase.module.net, x[:1]), rel=1e-4)
        with torch.no_grad():
            getattr(guide.locs, name)[::2] = -20.0
            getattr(guide.log_scales, name)[::2] = 3.0
        before = phase.standing().macs
        phase.finish()
        left = method.units[name].remaining
        widths[index] = int(left.sum())
        assert widths[index] == len(left) // 2
        # Those that fell to the prior are there with a probability of their own, not 0.
        assert count_macs(method.small, x[:1]) < before


def test_a_run_that_is_stopped_in_every_phase_ends_with_the_same_bits(finished, digits, tmp_path):
    directory, summary = finished
    left = 0

    def stop():
        nonlocal left
        left -= 1
        return left <= 0

    done = 0
    # Inside the first turn, at its end, in the last turn, in fine-tuning.
    for epochs in (3.5, 5, 8.5, 9.5):
        left = round(epochs * STEPS) - done
        done += left
        with pytest.raises(Interrupted):
            training.train(request(), digits, tmp_path / "run", stop=stop)
        told = read_posterior(tmp_path / "run")
        assert (list(told.sites), told.waiting) == (
            (["stem"], ["a", "fc"]) if epochs <= 5 else (["stem", "a", "fc"], [])
        )
        torch.manual_seed(99)
    again = training.train(request(), digits, tmp_path / "run").to_dict()
    assert without_times(again) == without_times(summary)
    assert lines_of(tmp_path / "run") == lines_of(directory)
    for (name, value), other in zip(
        state_of(directory).items(), state_of(tmp_path / "run").values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_a_run_stopped_in_its_first_epoch_names_the_gates_without_a_turn(digits, tmp_path):
    asked = request(dense_epochs=0)
    with pytest.raises(Interrupted):
        training.train(asked, digits, tmp_path, stop=lambda: True)
    told = read_posterior(tmp_path)
    assert (list(told.sites), told.waiting) == (["stem"], ["a", "fc"])
    gates = Checkpoint.read(tmp_path / "checkpoint.pt").gates
    assert list(gates) == ["stem", "a", "fc"] and gates["stem"] == len(told.snr()["stem"])


def test_checkpoints_hold_one_network_and_the_posterior_of_every_gate(finished):
    saved = Checkpoint.read(finished[0] / "checkpoint.pt")
    _, stem, a, fc = saved.finished
    assert set(stem["guide"]) == {"locs.stem_unconstrained", "log_scales.stem_unconstrained"}
    assert set(stem) == set(a) == {"guide", "equivalence", "units"}
    assert "net.head.weight" in fc["module"]
    sizes = {"stem": 12, "a": 16, "fc": 24}
    assert {name: len(loc) for name, (loc, _) in saved.posteriors.items()} == sizes


def test_the_posterior_of_a_run_is_that_of_all_turns(finished):
    directory, summary = finished
    posterior = read_posterior(directory)
    assert (posterior.epoch, posterior.epochs, posterior.elements) == (7, 7, "units")
    assert {name: q.loc.shape for name, q in posterior.sites.items()} == {
        "stem": (12,), "a": (16,), "fc": (24,),
    }  # fmt: skip
    kept = {name: int((snr >= 1).sum()) for name, snr in posterior.snr().items()}
    assert kept == {unit["gate"]: unit["kept"] for unit in summary["units"]}
    kl = sum(float(kl.sum()) for kl in posterior.kl().values())
    ends = {line["phase"]: line["kl"] for line in lines_of(directory)}
    told = [value for phase, value in ends.items() if phase.startswith("gate ")]
    assert kl == pytest.approx(1438 * sum(told), rel=1e-4)
    assert "head.weight" in posterior.weights
    rows = describe(Run.read(directory), posterior)["gates"]
    assert [row["kept"] for row in rows] == list(kept.values())


@pytest.mark.parametrize("scale", [2.0, None])
def test_of_units_that_were_gone_before_their_turn_the_posterior_is_the_prior(scale):
    x = torch.randn(2, 1, 28, 28)
    recipe = RECIPE.replace(dense_epochs=0, kl_scale=1.0, prior_scale=scale)
    rbp = RBP(LeNet5(), x, recipe, 100, input_features=("fc1",))
    for phase in rbp.phases():
        gate = phase.name.removeprefix("gate ")
        if gate == "fc1_input":
            break
        turn_off(phase, gate, [1, 3])
        phase.finish()
    turn_off(phase, gate, [0, 15, 16])  # of those that are left: of channels 0 and 2
    for found in (rbp.posteriors(), phase.posteriors()):
        q, prior = RBP.distributions(*found["fc1_input"], recipe)
        gone = torch.zeros(50, 16, dtype=torch.bool)
        gone[[1, 3]] = True
        assert q.loc.shape == (800,)
        kl = torch.distributions.kl_divergence(q, prior).view(50, 16)
        assert float(kl[gone].max()) < 1e-3
        under = gone.clone()
        under[[0, 0, 2], [0, 15, 0]] = True
        assert torch.equal(q.snr.view(50, 16) < 1, under)


def test_pruning_again_goes_on_from_what_is_left(finished, digits, tmp_path):
    directory, summary = finished

    def prune(name, **settings):
        result = again.prune_again(
            request(), digits, directory, tmp_path / name, **settings
        ).to_dict()
        return result, loading.load(tmp_path / name, constructor=Residual)

    same, net = prune("same", threshold=RECIPE.threshold)
    lower, other = prune("lower", threshold=0.0)
    assert same["units"] == lower["units"] == summary["units"]
    assert same["error"]["pruned"] == lower["error"]["pruned"] == summary["error"]["pruned"]
    for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    higher, _ = prune("higher", threshold=3.0)
    assert all(
        h["kept"] <= s["kept"] for h, s in zip(higher["units"], summary["units"], strict=True)
    )
    assert higher["macs"]["pruned"] < summary["macs"]["pruned"]
    # A budget counts from the dense network; one that is met already takes nothing.
    ratio = summary["macs"]["ratio"]
    assert prune("met", budget=MacsRatio(0.9 * ratio))[0]["units"] == summary["units"]
    half = prune("half", budget=MacsRatio(2 * ratio))[0]["macs"]["ratio"]
    assert 2 * ratio <= half < 4 * ratio
    with pytest.raises(RequestError, match=r"cannot be met: .* the network has"):
        prune("no", budget=MacsRatio(1e6))
    rows = again.sweep(request(), digits, directory, [0.5, 1.0, 3.0])
    assert [row["macs"] for row in rows[:2]] == [summary["macs"]["pruned"]] * 2
    assert rows[2]["macs"] == higher["macs"]["pruned"]


def test_a_gate_that_carries_nothing_keeps_its_best_unit_and_is_named(digits, tmp_path):
    asked = request(dense_epochs=0, epochs=6, finetune_epochs=0, kl_scale=300.0)
    summary = training.train(asked, digits, tmp_path / "r").to_dict()
    assert [unit["kept"] for unit in summary["units"]] == [1, 1, 1]
    assert summary["held"] == ["stem", "a", "fc"]
    assert [unit["zeroed"] for unit in summary["units"]][1] <= 1  # of a group that must stay
    assert lines_of(tmp_path / "r")[-1]["units"] == {"stem": 1, "a": 1, "fc": 1}


def test_fewer_epochs_than_gates_are_refused_in_one_line(digits, tmp_path):
    with pytest.raises(RequestError, match="epochs is 2, but there are 3 gates: rbp needs") as e:
        training.train(request(epochs=2), digits, tmp_path / "run")
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


def test_a_prior_that_would_keep_what_falls_to_it_is_refused(digits, tmp_path):
    with pytest.raises(RequestError, match=r"prior_scale 0.5 is too narrow for the threshold 1: "):
        training.train(request(prior_scale=0.5), digits, tmp_path / "run")
    with pytest.raises(RequestError, match=r"ratio of 0\.33.* and would be kept"):
        training.train(request(prior_scale=1e5, threshold=0.33), digits, tmp_path / "run")


def test_rounding_takes_the_weakest_of_a_gate_that_has_lost_units(finished, digits, tmp_path):
    directory, summary = finished
    result = again.prune_again(request(), digits, directory, tmp_path / "r", round_to=4).to_dict()
    for before, after in zip(summary["units"], result["units"], strict=True):
        there = before["kept"] + before["zeroed"]
        whole = there == before["total"] or there < 4
        expected = there if whole else there - there % 4
        assert after["kept"] + after["zeroed"] == expected
    with pytest.raises(RequestError, match="round_to is 0"):
        again.prune_again(request(), digits, directory, tmp_path / "n", round_to=0)


def test_all_gates_at_once_with_the_log_uniform_prior_is_sbp(digits, tmp_path):
    changes = {"epochs": 2, "dense_epochs": 1, "recalibrate": False}
    together = RECIPE.replace(**changes, prior_scale=None, order="together")
    shared = {key: value for key, value in together.to_dict().items() if key != "order"}
    found = []
    for recipe in (SBPRecipe(**shared), together):
        asked, method = dataclasses.replace(request(), recipe=recipe), recipe.method
        summary = training.train(asked, digits, tmp_path / method).to_dict()
        found.append(({**without_times(summary), "method": ""}, lines_of(tmp_path / method)))
    assert found[0] == found[1]
    assert [line["phase"] for line in found[1][1]] == ["dense", "gated", "gated", "finetuned"]


def method(net, x, **changes):
    torch.manual_seed(0)
    return RBP(net, x, RECIPE.replace(dense_epochs=0, **changes), num_data=100)


def turn_off(phase, gate, units):
    """Let some units of a turn fall to noise, and the others stay."""
    guide = phase.guide
    with torch.no_grad():
        locs, log_scales = (
            guide.get_submodule(name).get_parameter(f"{gate}_unconstrained")
            for name in ("locs", "log_scales")
        )
        log_scales.fill_(-8.0)
        log_scales[units], locs[units] = 4.0, -20.0


def test_the_reversed_order_begins_with_the_last_gate():
    phases = method(Residual(), torch.randn(4, 1, 8, 8), order="reversed").phases()
    assert next(phases).name == "gate fc"
    assert method(Residual(), torch.randn(4, 1, 8, 8), order="together").turns() == [
        Turn("gated", ("stem", "a", "fc"), 7)
    ]


def test_a_turn_trains_its_own_noise_and_the_weights_of_what_is_left():
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    rbp = method(Residual(), x)
    pyro.clear_param_store()
    sizes, seen = [], []
    for phase in rbp.phases():
        if phase.name == "finetuned":
            break
        gate = phase.name.removeprefix("gate ")
        weights, noise = phase.groups()
        phase.train_mode()
        parts = phase.loss(x, y)
        (parts.nll + parts.kl).backward()
        assert len(noise["params"]) == 2 and all(bool(p.grad.any()) for p in noise["params"])
        assert all(bool(p.grad.any()) for p in weights["params"])
        names = [name for name, _ in phase.module.named_parameters() if "unconstrained" in name]
        assert names == [f"guide.{p}.{gate}_unconstrained" for p in ("locs", "log_scales")]
        sizes.append(sum(p.numel() for p in weights["params"]))
        assert weights["params"][0] is next(rbp._stage.net.parameters())
        turn_off(phase, gate, slice(None, None, 3))  # as many in both groups
        phase.finish()
        seen.append(gate)
        assert list(pyro.get_param_store().keys()) == []  # or every network would stay in memory
    assert seen == ["stem", "a", "fc"]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert sum(p.numel() for p in rbp.small.parameters()) < sizes[-1]


def test_units_are_told_by_their_first_numbers():
    x = torch.randn(4, 36)
    net = LeNet300_100(in_features=36)
    torch.manual_seed(0)
    recipe = RECIPE.replace(dense_epochs=0, kl_scale=1.0)
    rbp = RBP(net, x, recipe, 100, input_features=("fc1",))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gone = {"fc1_input": [0, 5, 6], "fc1": [1, 2, 299], "fc2": [3, 50]}
    for phase in rbp.phases():
        if phase.name == "finetuned":
            break
        gate = phase.name.removeprefix("gate ")
        turn_off(phase, gate, gone[gate])
        phase.finish()
    for name, units in gone.items():
        assert torch.nonzero(rbp.units[name].removed).flatten().tolist() == units
    kept = {name: torch.nonzero(unit.kept).flatten() for name, unit in rbp.units.items()}
    assert torch.equal(rbp.small.fc1.select.index, kept["fc1_input"])
    # Nothing was trained: the weights are those of the kept rows and columns, times one mean.
    expected = before["fc2.weight"][kept["fc2"]][:, kept["fc1"]]
    ratio = rbp.small.fc2.weight / expected
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-5) and ratio[0, 0] > 0.99


def test_a_column_that_stands_for_a_removed_unit_stays_zero():
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    rbp = method(Residual(), x, order="reversed")
    phases = rbp.phases()
    phase = next(phases)
    phase.finish()
    phase = next(phases)
    assert phase.name == "gate a"
    turn_off(phase, "a", [0, 1, 2])  # all of one group of b, which has as many columns in the other
    phase.finish()
    assert int(rbp.units["a"].zeroed.sum()) == 3
    phase = next(phases)
    net = phase.module.net
    zero = net.b.weight == 0
    assert int(zero.sum()) == 3 * 6 * 9
    optimizer = torch.optim.Adam(phase.groups(), lr=0.1)
    for _ in range(3):
        phase.train_mode()
        optimizer.zero_grad()
        phase.loss(x, y).nll.backward()
        optimizer.step()
    assert torch.equal(net.b.weight == 0, zero)
    phase.finish()
    assert int(rbp.units["a"].zeroed.sum()) == 3
