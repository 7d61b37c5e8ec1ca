"""The rows of the page "For Pyro users": each is a test of the name that it makes."""

import copy
import importlib.util
import io
import itertools
import pickle
import re
import warnings
from collections import defaultdict
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.infer as infer
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide, reparam
from pyro.infer.autoguide import init_to_value
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform, TruncatedNormal
from pyro_sbp.models import sites

PAGE = (Path(__file__).parents[2] / "docs" / "from_pyro.md").read_text("utf-8")
TABLES = re.findall(r"^\| feature \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, flags=re.M)
ROWS = [row.strip("|").split("|")[0] for table in TABLES for row in table.splitlines()]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
NOISE = 0.5
X = torch.tensor([[1.0, 0.2], [-0.5, 1.0], [0.7, -1.0], [1.5, 0.1], [-1.0, -0.4], [0.3, 0.8]])
Y = X @ torch.tensor([0.8, 0.3])
START = init_to_value(values={"theta": torch.tensor([0.5, 0.2])})


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


def name_of(row):
    """The name of the test of a row."""
    return "test_" + re.sub(r"\W+", "_", row.lower()).strip("_")


def test_every_row_has_a_test_and_every_test_a_row():
    tests = {name for name in globals() if name.startswith("test_")}
    assert len(ROWS) == len({name_of(row) for row in ROWS})
    assert {name_of(row) for row in ROWS} == tests - {
        "test_every_row_has_a_test_and_every_test_a_row"
    }


def regression(x=X, y=Y):
    with pyro.plate("features", 2):
        theta = pyro.sample("theta", TruncatedLogUniform(-20.0, 0.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ theta, NOISE), obs=y)


def guide_of(model=regression, **settings):
    return sbp.TruncatedLogNormalGuide(model, init_loc=-1.0, init_log_scale=-1.0, **settings)


def gated(noise_per="batch"):
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    model = sbp.GatedModel(net, sbp.find_gates(net, X), len(X), noise_per=noise_per)
    return model, sbp.TruncatedLogNormalGuide(model), torch.arange(len(X)) % 3


def steps(elbo, model=regression, guide=None, count=3):
    """Losses of training, which are finite and move the guide."""
    guide = guide or guide_of()
    guide()
    before = [p.detach().clone() for p in guide.parameters()]
    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    losses = torch.tensor([svi.step() for _ in range(count)])
    assert bool(losses.isfinite().all())
    after = list(guide.parameters())
    assert before and all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return losses


def same_expectation(elbo):
    """The loss is that of closed forms, in the mean over draws."""
    guide = guide_of()
    with torch.no_grad():
        draws = torch.tensor([elbo.loss(regression, guide) for _ in range(60)])
        exact = torch.tensor([sbp.ClosedFormELBO().loss(regression, guide) for _ in range(60)])
    error = (draws.var() / len(draws) + exact.var() / len(exact)).sqrt()
    assert abs(draws.mean() - exact.mean()) < 5 * error


def test_tracemeanfield_elbo():
    guide = guide_of()
    pyro.set_rng_seed(1)
    theirs = infer.TraceMeanField_ELBO().loss(regression, guide)
    pyro.set_rng_seed(1)
    assert theirs == pytest.approx(sbp.ClosedFormELBO().loss(regression, guide), rel=1e-6)
    steps(infer.TraceMeanField_ELBO())


def test_closedformelbo():
    steps(sbp.ClosedFormELBO())
    guide = guide_of()
    parts = sbp.ClosedFormELBO().parts(regression, guide)
    assert float(parts.kl.detach()) == pytest.approx(float(guide.kl()["theta"].sum()), rel=1e-6)


def test_trace_elbo():
    same_expectation(infer.Trace_ELBO())
    steps(infer.Trace_ELBO())


def test_tracegraph_elbo():
    same_expectation(infer.TraceGraph_ELBO())
    steps(infer.TraceGraph_ELBO())


def test_traceenum_elbo():
    def model():
        with pyro.plate("features", 2):
            theta = pyro.sample("theta", TruncatedLogUniform(-20.0, 0.0))
        with pyro.plate("data", len(X)):
            outlier = pyro.sample("outlier", dist.Bernoulli(0.1), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(X @ theta, NOISE + 3 * outlier), obs=Y)

    guide = guide_of(poutine.block(model, hide=["outlier"]))
    steps(infer.TraceEnum_ELBO(max_plate_nesting=1), model, guide)


def test_renyielbo():
    steps(infer.RenyiELBO(alpha=0.5, num_particles=2))


def test_jittrace_elbo_jittracemeanfield_elbo():
    # The posterior is narrow at first: different draws hardly differ, but for a sampled KL.
    for jit, eager, tolerance in (
        (infer.JitTrace_ELBO, infer.Trace_ELBO, 8.0),
        (infer.JitTraceMeanField_ELBO, infer.TraceMeanField_ELBO, 0.4),
    ):
        losses = []
        for elbo in (jit(ignore_jit_warnings=True), eager()):
            pyro.clear_param_store()
            pyro.set_rng_seed(2)
            losses.append(steps(elbo, *gated_without_arguments(), count=2))
        torch.testing.assert_close(*losses, rtol=0, atol=tolerance)


def gated_without_arguments():
    """A network's model and guide as functions of no arguments."""
    model, guide, y = gated()

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.guide = guide

        def forward(self):
            return self.guide(X, y)

    return (lambda: model(X, y)), Guide()


def test_vectorize_particles_true():
    elbo = infer.TraceMeanField_ELBO(4, max_plate_nesting=1, vectorize_particles=True)
    steps(elbo, *gated_without_arguments())

    def outer(theta):
        return theta.unsqueeze(-2) if theta.ndim > 1 else theta

    def model():
        with pyro.plate("features", 2):
            theta = pyro.sample("theta", TruncatedLogUniform(-20.0, 0.0))
        with pyro.plate("data", len(X)):
            return pyro.sample("y", dist.Normal((outer(theta) * X).sum(-1), NOISE), obs=Y)

    steps(elbo, model, guide_of(model))


def test_autonormal_autodiagonalnormal_autolowrankmultivariatenormal_automultivariatenormal():
    for kind in (
        autoguide.AutoNormal,
        autoguide.AutoDiagonalNormal,
        autoguide.AutoLowRankMultivariateNormal,
        autoguide.AutoMultivariateNormal,
    ):
        guide = kind(regression, init_loc_fn=START)
        steps(infer.Trace_ELBO(), regression, guide)
        theta = guide()["theta"]
        assert bool(((theta > 0) & (theta <= 1)).all())


def test_autodelta():
    guide = autoguide.AutoDelta(regression, init_loc_fn=START)
    steps(infer.Trace_ELBO(), regression, guide)


def test_autoiafnormal():
    steps(infer.Trace_ELBO(), regression, autoguide.AutoIAFNormal(regression))


def test_autolaplaceapproximation():
    def model():
        scale = pyro.sample("scale", TruncatedNormal(0.0, 1.0, 0.0, torch.inf))
        with pyro.plate("data", len(Y)):
            pyro.sample("y", dist.Normal(0.0, scale), obs=Y)

    guide = autoguide.AutoLaplaceApproximation(model)
    steps(infer.Trace_ELBO(), model, guide)
    assert bool(guide.laplace_approximation().get_posterior().stddev.isfinite().all())


def test_autoguidelist():
    def model():
        with pyro.plate("features", 2):
            theta = pyro.sample("theta", TruncatedLogUniform(-20.0, 0.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ theta, scale), obs=Y)

    guide = autoguide.AutoGuideList(model)
    guide.append(guide_of(poutine.block(model, expose=["theta"])))
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["scale"])))
    steps(infer.TraceMeanField_ELBO(), model, guide)


def sampled(**settings):
    kernel = infer.NUTS(regression, init_strategy=START, max_tree_depth=4, **settings)
    mcmc = infer.MCMC(kernel, num_samples=8, warmup_steps=8, disable_progbar=True)
    mcmc.run()
    theta = mcmc.get_samples()["theta"]
    assert theta.shape == (8, 2) and bool(((theta > 0) & (theta <= 1)).all())
    return mcmc


@pytest.mark.parametrize(
    ("of_site", "low", "high"),
    [
        (lambda: TruncatedNormal(0.5, 0.5, 0.0, 1.0), 0.0, 1.0),
        (lambda: TruncatedNormal(0.5, 0.5, 0.0, torch.inf), 0.0, torch.inf),
        (lambda: TruncatedLogNormal(-1.0, 1.0), 0.0, 1.0),
        (lambda: TruncatedLogUniform(-20.0, 0.0), 0.0, 1.0),
    ],
)
def test_nuts_hmc(of_site, low, high):
    def model():
        theta = pyro.sample("theta", of_site())
        pyro.sample("y", dist.Normal(theta, NOISE), obs=torch.tensor(0.4))

    start = init_to_value(values={"theta": torch.tensor(0.5)})
    for kernel in (infer.NUTS, infer.HMC):
        mcmc = infer.MCMC(
            kernel(model, init_strategy=start), num_samples=8, warmup_steps=8, disable_progbar=True
        )
        mcmc.run()
        theta = mcmc.get_samples()["theta"]
        assert bool(((theta > low) & (theta <= high)).all()) and len(theta.unique()) > 1


def test_nuts_jit_compile_true():
    sampled(jit_compile=True, ignore_jit_warnings=True)


def test_trace_replay_block_condition_do():
    guide = guide_of()
    trace = poutine.trace(guide).get_trace()
    replayed = poutine.trace(poutine.replay(regression, trace)).get_trace()
    assert torch.equal(replayed.nodes["theta"]["value"], trace.nodes["theta"]["value"])
    assert replayed.log_prob_sum().isfinite()
    fixed = {"theta": torch.tensor([0.5, 0.1])}
    for handler in (poutine.condition, poutine.do):
        value = handler(lambda: regression(X, None), data=fixed)()
        assert value.shape == (6,)
    # The parameters refer to objects of Pyro that cannot be pickled.
    for unpicklable in (guide, gated_without_arguments()[1].guide):
        hidden = poutine.block(unpicklable, hide_types=["param"])
        trace = poutine.trace(hidden).get_trace(X)
        again = pickle.loads(pickle.dumps(trace))
        for name in trace.stochastic_nodes:
            assert torch.equal(again.nodes[name]["value"], trace.nodes[name]["value"])
    blocked = poutine.trace(poutine.block(regression, hide=["theta"])).get_trace()
    assert "theta" not in blocked.nodes


def test_mask_scale():
    guide = guide_of()
    kl = guide.kl()["theta"]

    def weighed(function):
        def call():
            on = torch.tensor([True, False])
            with pyro.plate("features", 2), poutine.mask(mask=on), poutine.scale(scale=3.0):
                return pyro.sample("theta", function())

        return call

    model = weighed(lambda: TruncatedLogUniform(-20.0, 0.0))
    posterior = weighed(lambda: guide.posteriors()["theta"])
    for elbo in (infer.TraceMeanField_ELBO(), sbp.ClosedFormELBO()):
        assert elbo.loss(model, posterior) == pytest.approx(3 * float(kl[0]), rel=1e-5)


def test_predictive():
    found = infer.Predictive(regression, guide=guide_of(), num_samples=5)(X, None)
    assert found["y"].shape == (5, 6)
    assert infer.Predictive(regression, sampled().get_samples())(X, None)["y"].shape == (8, 6)


@pytest.mark.parametrize("noise_per", ["batch", "example"])
def test_predictive_parallel_true(noise_per):
    model, guide, _ = gated(noise_per)
    predictive = infer.Predictive(model, guide=guide, num_samples=6, parallel=True)
    assert predictive(X)["obs"].shape == (6, 6)


@pytest.mark.parametrize("parallel", [False, True])
def test_theta_of_predictive_in_model_gated(parallel):
    """As many draws as examples: each draw is still that of all examples."""
    model, guide, _ = gated()
    found = infer.Predictive(
        model, guide=guide, num_samples=6, parallel=parallel, return_sites=("0",)
    )(X)
    assert found["0"].shape == (6, 1, 4)
    output = model.gated(X, found)
    assert output.shape == (6, 6, 3)
    for draw, theta in zip(output, found["0"], strict=True):
        torch.testing.assert_close(draw, model.gated(X, {"0": theta[0]}))


def test_transformreparam():
    def model():
        with pyro.plate("features", 2):
            theta = pyro.sample("theta", TruncatedLogNormal(-3.0, 2.0))
        with pyro.plate("data", len(X)):
            return pyro.sample("y", dist.Normal(X @ theta, NOISE), obs=Y)

    changed = poutine.reparam(model, config={"theta": reparam.TransformReparam()})
    trace = poutine.trace(changed).get_trace()
    assert type(trace.nodes["theta_base"]["fn"]) is TruncatedNormal
    torch.testing.assert_close(
        trace.nodes["theta"]["value"], trace.nodes["theta_base"]["value"].exp()
    )
    guide = sbp.TruncatedNormalGuide(changed)
    steps(infer.TraceMeanField_ELBO(), changed, guide)


def test_nested_and_subsampled_plates():
    def model():
        with pyro.plate("rows", 4, subsample_size=2, dim=-2), pyro.plate("columns", 3):
            pyro.sample("theta", TruncatedLogUniform(-20.0, 0.0))

    guide = guide_of(model)
    assert guide.mean()["theta"].shape == (4, 3) and guide()["theta"].shape == (2, 3)
    kl = float(guide.kl()["theta"].sum())
    for elbo in (infer.TraceMeanField_ELBO(), sbp.ClosedFormELBO()):
        # All elements have the same posterior, so any two rows stand for the four.
        assert elbo.loss(model, guide) == pytest.approx(kl, rel=1e-5)


def test_torch_compile():
    def statistics(loc):
        q = TruncatedNormal(loc, 1.0, -1.0, 1.0, validate_args=False)
        theta = TruncatedLogNormal(loc, 1.0, -2.0, 1.0, validate_args=False)
        densities = q.log_prob(loc), q.cdf(loc), theta.log_prob(loc.exp())
        return *densities, *(
            f for d in (q, theta) for f in (d.mean, d.variance, d.snr, d.entropy())
        )

    loc = torch.tensor([-0.3, 0.2])
    found = torch.compile(statistics, backend="eager", fullgraph=True)(loc)
    torch.testing.assert_close(found, statistics(loc))


def test_torch_func_vmap_jvp_hessian():
    def density(loc):
        return TruncatedNormal(loc, 1.0, -1.0, 1.0).log_prob(torch.tensor(0.2))

    loc = torch.tensor([-0.3, 0.0, 0.4])
    torch.testing.assert_close(torch.func.vmap(density)(loc), density(loc))
    _, tangent = torch.func.jvp(density, (loc,), (torch.ones(3),))
    torch.testing.assert_close(tangent, torch.func.vmap(torch.func.grad(density))(loc))
    # Of the normaliser, whose second derivative in loc is the variance, less 1 for the exponent.
    variance = TruncatedNormal(loc, 1.0, -1.0, 1.0).variance
    hessian = torch.func.hessian(lambda loc: density(loc).sum())(loc)
    torch.testing.assert_close(hessian, torch.diag(-variance))


def test_render_model():
    assert "theta" in pyro.render_model(regression, render_distributions=True).source


def test_torch_save_copy_deepcopy_state_dict():
    model, guide, y = gated()
    file = io.BytesIO()
    torch.save({"network": model.gated.net.state_dict(), "guide": guide.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    pyro.set_rng_seed(9)
    other, other_guide, _ = gated()
    with torch.no_grad():
        other_guide.locs.get_parameter("0_unconstrained").fill_(-3.0)
    other.gated.net.load_state_dict(saved["network"])
    other_guide.load_state_dict(saved["guide"])
    theta = {"0": torch.full((4,), 0.5)}
    torch.testing.assert_close(other.gated(X, theta), model.gated(X, theta), rtol=0, atol=0)
    torch.testing.assert_close(other_guide.snr(), guide.snr(), rtol=0, atol=0)
    copied = copy.deepcopy(guide)
    before = guide.snr()["0"]
    infer.SVI(model, copied, pyro.optim.Adam({"lr": 0.1}), infer.Trace_ELBO()).step(X, y)
    assert torch.equal(guide.snr()["0"], before)
    assert not torch.equal(copied.snr()["0"], before)


def test_get_param_store_save(tmp_path, monkeypatch):
    def made(seed):
        # As in a new process, where modules are counted from the start.
        monkeypatch.setattr(sites, "_numbers", defaultdict(itertools.count))
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        return gated()

    model, guide, y = made(0)
    infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), sbp.ClosedFormELBO()).step(X, y)
    pyro.get_param_store().save(tmp_path / "store")
    other, other_guide, y = made(1)
    with pyro.get_param_store().scope():
        torch.serialization.add_safe_globals([type(torch.distributions.constraints.real)])
        pyro.get_param_store().load(tmp_path / "store")
        other(X, other_guide(X))
        torch.testing.assert_close(other_guide.snr(), guide.snr(), rtol=0, atol=0)
        # The network has its own weights, as the page says.
        first, second = (m.gated.net[0].weight for m in (model, other))
        assert not torch.equal(first, second)


def test_arviz():
    found = infer.Predictive(regression, guide=guide_of(), num_samples=20)(X, None)
    chains = {name: value.detach().numpy()[None] for name, value in found.items()}
    assert chains["theta"].shape[:2] == (1, 20)  # chains, draws
    if importlib.util.find_spec("arviz"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own future version
            import arviz

            try:
                found = arviz.from_dict(posterior=chains)
            except TypeError:  # version 1
                found = arviz.from_dict({"posterior": chains})
        assert dict(found.posterior.sizes)["draw"] == 20


def test_torch_set_default_device():
    gates = {gate.name for gate in gated()[0].gates}
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    torch.set_default_device("meta")
    try:
        found = sbp.find_gates(net, X)
        assert {gate.name for gate in found} == gates
        model = sbp.GatedModel(net, found, len(X))
        guide = sbp.TruncatedLogNormalGuide(model)
        parts = sbp.ClosedFormELBO().parts(model, guide, X, Y.long())
        assert parts.loss.device == next(guide.parameters()).device == X.device
    finally:
        torch.set_default_device(None)
