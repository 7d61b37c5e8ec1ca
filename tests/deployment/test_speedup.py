"""The budget of a measured speed-up."""

import pytest
import torch

import pyro_sbp as sbp
from pyro_sbp.deployment import speedup
from pyro_sbp.deployment.benchmarking import Comparison, Latency
from pyro_sbp.deployment.speedup import Speedup


@pytest.fixture
def lenet(monkeypatch):
    """A gated LeNet-300-100, and latencies in proportion to the parameters."""
    calls = []

    def benchmark(dense, pruned, x, *, batch_sizes, threads, devices, runtimes, seconds):
        sizes = [sum(p.numel() for p in net.parameters()) for net in (dense, pruned)]
        calls.append(seconds)
        # The short measurements are too optimistic.
        factor = 1.2 if seconds < 1 else 1.0
        ratio = factor * sizes[0] / sizes[1]
        latency = Latency(
            device="cpu", threads=threads[0], batch_size=batch_sizes[0], dense_ms=sizes[0],
            pruned_ms=sizes[1], speedup=ratio, spread=0.0, runtime=runtimes[0],
            speedup_low=0.95 * ratio, speedup_high=1.04 * ratio,
        )  # fmt: skip
        return Comparison(1, 1, *sizes, (latency,))

    monkeypatch.setattr(speedup, "benchmark", benchmark)
    torch.manual_seed(0)
    net = sbp.networks.LeNet300_100()
    x = torch.rand(2, 1, 28, 28)
    model = sbp.GatedModel(net, sbp.find_gates(net, x), num_data=10)
    guide = sbp.TruncatedLogNormalGuide(model)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter))
    return (model, guide, x), calls


def test_the_network_that_is_found_is_fast_enough_in_a_long_measurement(lenet):
    arguments, calls = lenet
    budget = Speedup(3.0, batch_size=4)
    small = sbp.prune(*arguments, budget=budget)
    dense = sum(p.numel() for p in arguments[0].gated.net.parameters())
    ratio = dense / sum(p.numel() for p in small.parameters())
    # The lower end of the interval is 5 % under the ratio.
    assert 3.0 / 0.95 <= ratio < 3.6 and calls[-1] == 2.0
    assert len(calls) < 20
    low, high = 0.95 * ratio, 1.04 * ratio
    assert budget.report(budget.level) == (
        f"the network is {ratio:.2f} times faster (eager, batch size 4, cpu, threads: 1); 95% "
        f"confidence interval {low:.2f} to {high:.2f}"
    )
    last = list(budget.latencies.values())[-1]
    assert (last.batch_size, last.speedup) == (4, pytest.approx(ratio))


def test_a_speedup_that_cannot_be_reached_says_what_can(lenet):
    words = r"1e\+06 cannot be met: .* the network is \d+\.\d\d times faster \(eager.* interval"
    with pytest.raises(ValueError, match=words):
        sbp.prune(*lenet[0], budget=Speedup(1e6))


def test_a_speedup_that_only_the_short_measurement_meets_is_refused(lenet):
    arguments, calls = lenet
    # The smallest network has one unit per gate: 784 + 1, 1 + 1 and 10 + 10 parameters.
    largest = sum(p.numel() for p in arguments[0].gated.net.parameters()) / 807
    words = rf"cannot be met: .* the network is {largest:.2f} times .*{0.95 * largest:.2f} to"
    with pytest.raises(ValueError, match=words):
        sbp.prune(*arguments, budget=Speedup(1.1 * largest))
    assert calls[-1] == 2.0
    with pytest.raises(ValueError, match=words):  # the interval contains the target
        sbp.prune(*arguments, budget=Speedup(0.97 * largest))


def test_a_budget_beside_another_one_is_refused(lenet):
    with pytest.raises(ValueError, match="give a budget or a macs_ratio, not both"):
        sbp.prune(*lenet[0], budget=Speedup(2.0), macs_ratio=2.0)
    with pytest.raises(ValueError, match="give a threshold or a speedup, not both"):
        sbp.prune(*lenet[0], budget=Speedup(2.0), threshold=1.0)
