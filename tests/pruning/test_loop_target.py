"""A target of MACs in a training loop of one's own."""

import io
import socket
import subprocess
import sys
import warnings

import numpy as np
import pyro
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.pruning.costs import UnitCosts
from pyro_sbp.pruning.macs_control import KLControl


@pytest.fixture(autouse=True)
def seeded():
    pyro.clear_param_store()
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").train.batch(slice(0, 512))


def network():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)
    )


#: The options of a pruner whose noise learns quickly.
QUICK = {"noise_learning_rate": 5e-2, "init_log_scale": -2.0}


def dense(digits):
    x, y = digits
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(10):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net


def loop(digits, pruner, optimizer, first, last, whole=False):
    """Train from one step to another, on a minibatch that depends on the step only."""
    x, y = digits
    for step in range(first, last):
        at = torch.Generator().manual_seed(step)
        batch = torch.randint(len(x), (64,), generator=at)
        optimizer.zero_grad()
        if whole:
            loss = pruner.loss(x[batch], y[batch])
        else:
            loss = F.cross_entropy(pruner.net(x[batch]), y[batch]) + pruner.kl_loss()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kl_scale, whole", [(5.0, False), (0.2, True)])
def test_a_loop_reaches_its_target(kl_scale, whole, digits):
    """With weights of the KL divergence that differ by a factor of 25."""
    x, y = digits
    net = dense(digits)
    pruner = sbp.Pruner(
        net, x[:2], len(x), kl_scale=kl_scale, target_macs_ratio=4, num_steps=320, **QUICK
    )
    if not whole:
        pruner.attach()
    loop(digits, pruner, torch.optim.Adam(pruner.parameters(lr=3e-3)), 0, 320, whole)
    assert pruner.control.standing()["reference"] == pytest.approx(4)
    assert pruner.target is None
    with warnings.catch_warnings(action="error"):  # the posterior is near the target
        small = pruner.prune()
    macs = sbp.count_macs(net, x[:1])
    assert 4 <= macs / sbp.count_macs(small, x[:1]) <= 4.4
    assert float((small(x).argmax(1) == y).float().mean()) > 0.9
    assert not pruner.attached
    # Rounded numbers of units have at most the MACs of the target too.
    rounded = pruner.prune(round_to=4)
    assert macs / sbp.count_macs(rounded, x[:1]) >= 4
    assert rounded[1].out_features % 4 == rounded[3].out_features % 4 == 0
    # An explicit threshold replaces the target.
    reached = pruner.target
    by_threshold = pruner.prune(threshold=1.0)
    expected = sbp.prune(pruner.model, pruner.guide, x[:2], threshold=1.0)
    assert by_threshold.units == expected.units != small.units
    assert pruner.target is None
    assert reached.ratio_by_threshold == macs / sbp.count_macs(by_threshold, x[:1])
    other = pruner.prune(macs_ratio=8.0)
    assert macs / sbp.count_macs(other, x[:1]) >= 8


def test_the_weights_are_those_of_the_controller_at_its_steps(digits):
    x, _ = digits
    pruner = sbp.Pruner(
        network(), x[:2], 512, kl_scale=3.0, macs_weight=1.0, target_macs_ratio=4, num_steps=100
    )
    costs = UnitCosts(pruner.net, pruner.gates, x[:2])
    control = KLControl({gate.name: 3.0 for gate in pruner.gates}, 1.0, 1.0, costs, target=4)
    assert pruner.model.kl_scale == control.weights
    pruner.attach()
    optimizer = torch.optim.Adam([pruner.noise_group()], lr=0.3)
    weights = []
    for step in range(130):
        with torch.no_grad():  # the noise shrinks or grows by itself
            for parameter in pruner.guide.log_scales.parameters():
                parameter += 0.04
        if step % 20 == 0 and step < 100:
            control.update(costs, pruner.guide.snr(), step / 100)
        with torch.no_grad():
            pruner.kl_loss()  # without gradients it is not a step
        loss = pruner.kl_loss()
        kl = {name: float(value.sum()) for name, value in pruner.guide.kl().items()}
        expected = sum(control.weights[name] * value for name, value in kl.items()) / 512
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
        assert pruner.model.kl_scale == control.weights
        weights.append(dict(pruner.model.kl_scale))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len({tuple(of_step.values()) for of_step in weights}) > 3
    assert all(of_step == weights[80] for of_step in weights[80:])


def resumable(digits, **options):
    torch.manual_seed(0)
    options = {"target_macs_ratio": 4, "num_steps": 90, **QUICK, **options}
    pruner = sbp.Pruner(network(), digits[0][:2], 512, **options).attach()
    return pruner, torch.optim.Adam(pruner.parameters(lr=3e-3))


def test_a_loop_that_is_resumed_ends_as_one_that_is_not(digits):
    def result(pruner):
        return {**pruner.net.state_dict(), **dict(pruner.guide.state_dict())}

    pruner, optimizer = resumable(digits)
    loop(digits, pruner, optimizer, 0, 90)
    whole, standing = result(pruner), pruner.control.standing()

    pruner, optimizer = resumable(digits)
    loop(digits, pruner, optimizer, 0, 47)  # not at an update of the weights
    file = io.BytesIO()
    parts = pruner.net, optimizer, pruner
    states = [part.state_dict() for part in parts]
    torch.save((states, torch.get_rng_state()), file)
    file.seek(0)
    pyro.clear_param_store()
    again, optimizer = resumable(digits)
    states, noise = torch.load(file, weights_only=True)
    for part, state in zip((again.net, optimizer, again), states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(noise)
    assert again.model.kl_scale == pruner.model.kl_scale
    loop(digits, again, optimizer, 47, 90)
    found = result(again)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert again.control.standing() == standing and standing["kl_factor"] != 1


def test_states_of_other_targets_are_refused(digits):
    states = {}
    for name, options in {
        "own": {},
        "longer": {"num_steps": 180},
        "none": {"target_macs_ratio": None, "num_steps": None},
    }.items():
        states[name] = resumable(digits, **options)[0].state_dict()
    pruner, _ = resumable(digits)
    plain, _ = resumable(digits, target_macs_ratio=None, num_steps=None)
    assert states["none"].keys() == dict(plain.guide.state_dict()).keys()
    plain.load_state_dict(states["none"])
    with torch.no_grad():
        for parameter in pruner.guide.parameters():
            parameter += 1
    wrong = resumable(digits)
    loop(digits, *wrong, 0, 7)
    states["wrong shape"] = {
        name: value if name == "macs_target" else value[:3]
        for name, value in wrong[0].state_dict().items()
    }
    moved = {name: value.clone() for name, value in pruner.guide.state_dict().items()}
    target = pruner.state_dict()["macs_target"]
    for into, state, message in [
        (plain, "own", r"with target_macs_ratio=4 and num_steps=90, as for the state"),
        (pruner, "none", "has no target of MACs, .* without target_macs_ratio, or load only the"),
        (
            pruner,
            "longer",
            "has target_macs_ratio 4 and num_steps 180, but the pruner has 4 and 90",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            into.load_state_dict(states[state])
    with pytest.raises(RuntimeError, match="size mismatch"):
        pruner.load_state_dict(states["wrong shape"])
    assert pruner.state_dict()["macs_target"] == target
    now = pruner.guide.state_dict()
    assert all(torch.equal(now[name], value) for name, value in moved.items())


def test_a_loop_that_ends_early_is_reported(digits):
    pruner, optimizer = resumable(digits)
    loop(digits, pruner, optimizer, 0, 7)
    words = (
        r"far from target_macs_ratio 4: the threshold 1 alone gives 1\.00 times fewer MACs, .*; "
        r"the loop has made 7 steps, and num_steps is 90$"
    )
    with pytest.warns(UserWarning, match=words) as caught:
        small = pruner.prune()
    assert len(caught) == 1 and caught[0].filename == __file__
    assert sbp.count_macs(pruner.net, digits[0][:1]) / sbp.count_macs(small, digits[0][:1]) >= 4
    assert pruner.target.far and pruner.target.ratio_by_threshold == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_steps": None}, "is 4, which needs the number of training steps .*; set num_steps"),
        ({"target_macs_ratio": None}, "num_steps is 90, and has no effect without a target; set"),
        ({"target_macs_ratio": 0.5}, "target_macs_ratio is 0.5; expected a number >= 1"),
        ({"target_macs_ratio": float("nan")}, "is nan; expected a number >= 1"),
        ({"target_macs_ratio": "4"}, "is '4'; expected a number >= 1"),
        ({"num_steps": 0}, "num_steps is 0; expected an integer >= 1"),
        ({"num_steps": 90.5}, "num_steps is 90.5; expected an integer >= 1"),
        ({"threshold": 0.0}, "is 4, which needs a threshold > 0; threshold is 0.0"),
        ({"kl_scale": 0.0}, "kl_scale is 0 for all gates, so no units would be removed"),
        # One unit in each of the layers: 64 + 1 + 10 of 64 * 48 + 48 * 32 + 32 * 10 MACs.
        ({"target_macs_ratio": 66}, r"is 66; expected at most 65\.70, .* one unit in every gate"),
        # All 48 units of the first layer: 64 * 48 + 48 + 10.
        (
            {"kl_scale": {"1": 0.0}},
            r"expected at most 1\.57, .* one unit in every gate whose kl_scale is not 0",
        ),
        ({"target_macs_ratio": float("inf")}, "target_macs_ratio is inf; expected at most"),
    ],
)
def test_arguments_that_contradict_a_target_are_refused(options, message, digits):
    with pytest.raises(ValueError, match=message):
        resumable(digits, **options)


def test_pruning_before_training_is_refused(digits):
    pruner, _ = resumable(digits)
    with pytest.raises(ValueError, match=r"^target_macs_ratio 4 cannot be met: .* was not trained"):
        pruner.prune()
    assert pruner.attached
    pruner, _ = resumable(digits, target_macs_ratio=None, num_steps=None)
    with pytest.raises(ValueError, match=r"^macs_ratio 3 cannot be met: .* was not trained"):
        pruner.prune(macs_ratio=3)


def test_a_failed_call_is_not_a_step(digits):
    x, y = digits
    pruner, _ = resumable(digits, macs_weight=np.float64(1))
    with pytest.raises(ValueError, match="cannot be called with theta while the noise"):
        pruner.loss(x[:4], y[:4])
    state = pruner.state_dict()
    assert state["macs_target"]["steps"] == 0
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=True)["macs_target"] == state["macs_target"]


def test_costs_other_than_macs_are_refused_with_a_target(digits):
    plain, _ = resumable(digits, target_macs_ratio=None, num_steps=None)
    plain.detach()
    costs = UnitCosts(plain.net, plain.gates, digits[0][:1])
    with pytest.raises(ValueError, match="weights units by their MACs; leave costs out"):
        resumable(digits, macs_weight=1.0, costs=costs)
    assert plain.control is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'macs'"):
        resumable(digits)[0].prune(macs=3)


PROCESS = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import pyro_sbp as sbp

dist.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
x = torch.randn(256, 10)
y = (x[:, 0] * x[:, 1] > 0).long()
options = {"noise_learning_rate": 0.1, "init_log_scale": -1.0}
pruner = sbp.Pruner(net, x[:2], 256, target_macs_ratio=4, num_steps=120, **options).attach()
optimizer = torch.optim.Adam(pruner.parameters(lr=1e-2))
parallel = DistributedDataParallel(net)
torch.manual_seed(dist.get_rank())  # other noise and other examples in every process
for _ in range(120):
    batch = torch.randint(256, (32,))
    optimizer.zero_grad()
    (F.cross_entropy(parallel(x[batch]), y[batch]) + pruner.kl_loss()).backward()
    pruner.average_gradients()
    optimizer.step()
small = pruner.prune()
kept = {name: unit.kept for name, unit in small.units.items()}
torch.save((pruner.state_dict(), kept), sys.argv[1] + str(dist.get_rank()))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_every_process_has_the_same_controller(tmp_path):
    (tmp_path / "process.py").write_text(PROCESS)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    script = [str(tmp_path / "process.py"), str(tmp_path / "state")]
    subprocess.run(
        [*launch, "--master-port", port, *script], check=True, timeout=300, capture_output=True
    )
    (first, units), (second, others) = (
        torch.load(tmp_path / f"state{rank}", weights_only=True) for rank in range(2)
    )
    assert first["macs_target"] == second["macs_target"]
    assert first["macs_target"]["steps"] == 120
    assert first["macs_target"]["control"]["factor"] != 1
    assert first.keys() == second.keys() and units.keys() == others.keys()
    for name, value in {**first, **units}.items():
        if name != "macs_target":
            assert torch.equal(value, {**second, **others}[name])
