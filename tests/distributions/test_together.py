"""Parts of a distribution compute together what they would compute alone."""

import copy
import pickle

import pytest
import torch
from torch.distributions import kl_divergence

from pyro_sbp import special
from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform, TruncatedNormal

SIZES = [3, 1, 4]
STATISTICS = {
    "mean": lambda q: q.mean,
    "stddev": lambda q: q.stddev,
    "snr": lambda q: q.snr,
    "mode": lambda q: q.mode,
    "entropy": lambda q: q.entropy(),
}


@pytest.fixture(params=[TruncatedNormal, TruncatedLogNormal])
def make(request):
    return request.param


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(0)
    loc = -10 * torch.rand(8, generator=generator)
    return loc.requires_grad_(), torch.rand(8, generator=generator).add(0.1).requires_grad_()


def alone(make, loc, scale):
    pairs = zip(loc.split(SIZES), scale.split(SIZES), strict=True)
    return [make(*pair, -20.0, 0.0) for pair in pairs]


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_those_of_each_alone(make, parameters, name):
    for part, single in zip(
        make(*parameters, -20.0, 0.0).split(SIZES), alone(make, *parameters), strict=True
    ):
        assert part.batch_shape == single.batch_shape
        torch.testing.assert_close(STATISTICS[name](part), STATISTICS[name](single))


def test_the_kl_and_its_gradient_are_those_of_each_alone(parameters):
    found = []
    for parts in (
        TruncatedLogNormal(*parameters, -20.0, 0.0).split(SIZES),
        alone(TruncatedLogNormal, *parameters),
    ):
        kls = [kl_divergence(q, TruncatedLogUniform().expand(q.batch_shape)) for q in parts]
        total = sum((i + 1) * kl.sum() for i, kl in enumerate(kls))
        found.append([*kls, *torch.autograd.grad(total, parameters)])
    for ours, single in zip(*found, strict=True):
        torch.testing.assert_close(ours, single)


def test_the_kl_is_computed_once_for_all(parameters, monkeypatch):
    sizes = []
    original = special.kl_to_uniform

    def counting(loc, *rest):
        sizes.append(len(loc))
        return original(loc, *rest)

    monkeypatch.setattr(special, "kl_to_uniform", counting)
    for q in TruncatedLogNormal(*parameters, -20.0, 0.0).split(SIZES):
        kl_divergence(q, TruncatedLogUniform().expand(q.batch_shape))
    assert sizes == [8]


def test_what_is_asked_for_without_gradients_leaves_the_others_theirs(make, parameters):
    first, second, _ = make(*parameters, -20.0, 0.0).split(SIZES)
    with torch.no_grad():
        assert not first.rsample().requires_grad and not first.mean.requires_grad
    assert second.rsample().requires_grad and second.mean.requires_grad


def test_a_draw_is_one_of_the_whole_and_the_next_is_another(make, parameters):
    whole = make(*parameters, -20.0, 0.0)
    torch.manual_seed(1)
    expected = [whole.rsample().split(SIZES) for _ in range(2)]
    torch.manual_seed(1)
    parts = whole.split(SIZES)
    for draw in expected:
        drawn = [part.rsample() for part in parts]
        for ours, theirs in zip(drawn, draw, strict=True):
            assert torch.equal(ours, theirs)
    total = sum((i + 1) * part.rsample().sum() for i, part in enumerate(parts))
    assert all(bool((grad != 0).all()) for grad in torch.autograd.grad(total, parameters))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_parts_can_be_copied(make, parameters, copied):
    parts = make(*(x.detach() for x in parameters), -20.0, 0.0).split(SIZES)
    means = [part.mean for part in parts]
    parts[0].rsample()  # what has been computed is not copied
    new = copied(parts)
    for part, mean in zip(new, means, strict=True):
        assert torch.equal(part.mean, mean)
    torch.manual_seed(0)
    draws = [part.rsample() for part in new]
    torch.manual_seed(0)
    assert torch.equal(torch.cat(draws), make(*parameters, -20.0, 0.0).rsample())


def test_a_part_that_is_asked_twice_gets_two_draws(make, parameters):
    first = make(*parameters, -20.0, 0.0).split(SIZES)[0]
    assert not torch.equal(first.rsample(), first.rsample())


def test_expanded_parts_draw_for_every_example(make, parameters):
    part = make(*parameters, -20.0, 0.0).split(SIZES)[2].expand([500, 4])
    draws = part.rsample()
    assert draws.shape == (500, 4) and len(draws[:, 0].unique()) > 400
    error = 4 * part.stddev[0] / 500**0.5
    assert bool(((draws.mean(0) - part.mean[0]).abs() < error).all())
