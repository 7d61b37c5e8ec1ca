"""What docs/ says is so, and its notebooks run and come to the right results."""

import json
import math
import re
import warnings
from pathlib import Path

import pyro
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_sbp as sbp
from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.deployment.unit_latency import UnitLatency
from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform
from pyro_sbp.distributions.log_uniform_kl import approximate_kl, exact_kl
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.models.gated_model import theta_prior
from pyro_sbp.networks import LeNet5
from pyro_sbp.pruning.costs import UnitCosts
from pyro_sbp.pruning.criteria import check_prior
from pyro_sbp.pruning.macs import count_macs, count_parameters
from pyro_sbp.recipes.criteria import CRITERIA
from pyro_sbp.recipes.recipe_files import read_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
NOTEBOOKS = {path.name: json.loads(path.read_text("utf-8")) for path in DOCS.glob("*.ipynb")}


# `plt.show()` has nowhere to show a figure.
pytestmark = pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()


def fenced(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.M | re.S)


def executed(name, pieces):
    space = {"__name__": "docs"}
    for piece in pieces:
        exec(compile(piece, name, "exec"), space)
    return space


def page(name):
    """The names that the Python of a page leaves, all its blocks executed in order."""
    return executed(name, fenced(name, "python"))


def notebook(name):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    cells = NOTEBOOKS[name]["cells"]
    try:
        return executed(name, ["".join(c["source"]) for c in cells if c["cell_type"] == "code"])
    finally:
        plt.close("all")


def table(page, first):
    """The rows of the table whose header begins with `first`, as lists of cells."""
    (found,) = re.findall(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGES[page], flags=re.M)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found.splitlines()]


def test_the_formulas_of_the_method():
    space = page("method.md")  # it asserts them itself
    assert space["parts"].kl > 0 and space["small"].fc1.in_features == 64
    assert [gate.name for gate in space["gates"]] == ["fc1", "fc2"]


def test_the_constants_of_the_method():
    prior = TruncatedLogUniform(-20.0, 0.0)
    start = TruncatedLogNormal(torch.tensor(0.0).double(), math.exp(-5), -20.0, 0.0)
    first, last = table("method.md", "a unit")
    numbers = [float(kl_divergence(start, prior)), float(start.mean), float(start.snr)]
    assert first[1:] == [f"{numbers[0]:.3f}", f"{numbers[1]:.4f}", f"{numbers[2]:.1f}"]
    assert last[1:] == ["0", f"{float(prior.mean):.4f}", f"{float(prior.snr):.4f}"]


def test_the_formulas_and_constants_of_recursive_pruning():
    space = page("rbp.md")  # it asserts them itself
    assert space["kl"].shape == (3,)
    start = TruncatedLogNormal(torch.tensor([0.0]).double(), math.exp(-5), -20.0, 0.0)
    for scale, kl, snr in table("rbp.md", "prior_scale"):
        like = torch.zeros((), dtype=torch.float64)
        prior = theta_prior(None if scale == "none" else float(scale), 1, like)
        assert [kl, snr] == [f"{float(kl_divergence(start, prior)):.2f}", f"{float(prior.snr):.4f}"]
    narrow = TruncatedLogNormal(torch.tensor(-20.0).double(), 1.2, -20.0, 0.0)
    assert float(narrow.icdf(torch.tensor(0.99).double())) < 1e-7
    check_prior(1.05, 1.0)
    with pytest.raises(ValueError, match="too narrow"):
        check_prior(1.0, 1.0)


def test_sparse_variational_dropout():
    space = page("sparse_vd.md")  # it asserts the rest itself
    assert type(space["small"]) is torch.nn.Sequential
    y = torch.linspace(-10, 10, 1000, dtype=torch.float64)
    found = float((approximate_kl(y) - exact_kl(y)).abs().max())
    assert table("sparse_vd.md", "KL")[0][1] == f"{found:.1e}".replace("e-0", "e-")


def test_regression():
    space = page("regression.md")  # it asserts the formulas itself
    assert space["kept"][0.1] > space["kept"][3.0]
    assert 0.3 < space["sigma"] < 0.9  # it has fallen from 1
    assert space["features"].shape == (10,)
    # The network that predicts the mean has the variance of the targets.
    assert space["error"] < 0.9 * float(space["y_test"].var())
    assert space["losses"][-1] < space["losses"][0]
    assert space["losses_by_site"][-1] < space["losses_by_site"][0]
    assert {name: value.shape for name, value in space["draws"].items()} == {
        "0": (1, 100, 30),
        "0_input": (1, 100, 10),
        "sigma": (1, 100),
    }


def test_the_criteria():
    found = page("criteria.md")["found"]
    for index, (_, *cells) in enumerate(table("criteria.md", "posterior")):
        for cell, (name, scores) in zip(cells, found.items(), strict=True):
            *number, word = cell.split(", ")
            score = float(scores[index])
            assert word == ("kept" if score >= CRITERIA[name].threshold else "removed")
            assert not number or float(number[0]) == pytest.approx(score, abs=0.01)
    rows = table("criteria.md", "criterion")
    assert [(name.strip("`"), float(value), ranks == "yes") for name, _, value, ranks in rows] == [
        (c.name, c.threshold, c.ranks) for c in CRITERIA.values()
    ]


def test_a_checkpoint_of_network_and_guide():
    space = page("from_pyro.md")
    assert torch.equal(space["model"].gated.net[0].weight, space["saved"]["network"]["0.weight"])


def test_the_limits():
    space = page("limits.md")
    assert [gate.name for gate in space["gates"]] == ["2"]
    assert space["gates"].not_prunable["0"].startswith("several of its units reach the same column")
    assert space["gates"].not_prunable["4"] == "reaches an output of the network"
    assert "no unit reaches the threshold 1000" in str(space["caught"][0].message)
    assert space["small"][2].out_features == 1


def test_the_reasons_are_those_of_the_code():
    code = "".join(path.read_text("utf-8") for path in (ROOT / "pyro_sbp/gates").glob("*.py"))
    for words, _ in table("limits.md", "`not_prunable` says"):
        for reason in re.findall(r"`(.+?)`", words):
            assert reason in code, reason


def before_training(plain):
    """The part of the loop in plain PyTorch that makes the data."""
    return plain[: plain.index("net = nn.Sequential")]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "library",
    [
        # The loop in plain torch is that of the README.
        pytest.param("torch", marks=pytest.mark.slow),
        pytest.param("target", marks=pytest.mark.slow),
        pytest.param("lightning", marks=pytest.mark.slow),
        pytest.param("transformers", marks=pytest.mark.slow),
    ],
)
def test_the_training_loops(library, monkeypatch):
    plain, target, *others = fenced("training_loops.md", "python")
    if library == "torch":
        found = executed("training_loops.md", [plain])
        correct = found["small"](found["test_x"]).argmax(1) == found["test_y"]
        assert float(correct.float().mean()) == pytest.approx(float(found["shown"]), abs=0.005)
        assert found["shown"] > 0.85
        assert sum(found["pruner"].units().values()) < 0.8 * (128 + 64)
        return
    if library == "target":
        with warnings.catch_warnings(action="error"):  # the posterior is near the target
            found = executed("training_loops.md", [before_training(plain), target])
        macs = [count_macs(found[name], found["x"][:1]) for name in ("net", "small")]
        assert 6 <= macs[0] / macs[1] <= 6.6
        correct = found["small"](found["test_x"]).argmax(1) == found["test_y"]
        assert float(correct.float().mean()) > 0.85
        return
    pytest.importorskip(library)
    (block,) = [block for block in others if f"pyro_sbp.integrations.{library}" in block]
    before = before_training(plain)
    if library == "transformers":
        pytest.importorskip("accelerate")
        # It takes tests/datasets, which is on the path, for the package `datasets`.
        monkeypatch.setattr("transformers.trainer.is_datasets_available", lambda: False)
    found = executed("training_loops.md", [before, block])
    if library == "lightning":
        assert found["module"].net[1].out_features < 128
        same, net = found["same"].net, found["module"].net.eval()
        assert torch.equal(same(found["x"]), net(found["x"])) and not same.training
    else:
        example = found["example_input"]
        assert count_macs(found["small"], example) < count_macs(found["model"], example)


@pytest.mark.parametrize("library", ["torch", pytest.param("transformers", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_hub(library):
    local, of_transformers = fenced("hub.md", "python")
    if library == "torch":
        found = executed("hub.md", [local])
        assert torch.equal(found["same"](found["x"]), found["small"](found["x"]))
        return
    pytest.importorskip("transformers")
    found = executed("hub.md", [of_transformers])
    same, small = (found[name](**found["tokens"]).logits for name in ("same", "small"))
    assert torch.equal(same, small)


def test_what_a_unit_of_lenet_5_costs():
    net, x = LeNet5(), torch.rand(1, 1, 28, 28)
    gates = find_gates(net, x, ["fc1"])
    costs = UnitCosts(net, gates, x)
    macs, relative = costs.per_unit(), costs.relative()
    assert table("recipes.md", "gate of LeNet-5") == [
        [f"`{g.name}`", str(g.size), f"{macs[g.name]:,.0f}", f"{relative[g.name]:.3g}"]
        for g in gates
    ]


def test_the_latency_of_units_weights_the_kl(monkeypatch):
    # A real measurement fails on a machine that is busy.
    def measured(net, gates, x, *, batch_size, seconds):
        line = {gate.name: [(1, 0.1), (gate.size, 0.1 * gate.size)] for gate in gates}
        return UnitLatency({gate.name: gate.size for gate in gates}, line, batch_size, 1, "cpu")

    monkeypatch.setattr(sbp, "measure_unit_latency", measured)
    space = page("recipes.md")
    relative = space["latency"].relative()
    assert space["pruner"].model.kl_scale == {
        name: pytest.approx(1 + cost) for name, cost in relative.items()
    }


def test_the_recipe_file(tmp_path):
    (text,) = fenced("recipes.md", "toml")
    (tmp_path / "mine.toml").write_text(text)
    recipe = read_recipe(tmp_path / "mine.toml")
    assert recipe.epochs == 40 and recipe.kl_scale == {"conv1": 15.0, "conv2": 4.0}


def test_the_recipe_of_efficientnet(tmp_path):
    (text,) = fenced("hub.md", "toml")
    (tmp_path / "efficientnet.toml").write_text(text)
    recipe = read_recipe(tmp_path / "efficientnet.toml")
    assert recipe.optimizer == "adamw" and recipe.schedule == "one-cycle"


def test_the_commands_exist():
    from pyro_sbp.cli import cli

    lines = [line for name in PAGES for text in fenced(name, "sh") for line in text.splitlines()]
    assert lines
    for line in lines:
        program, command, *words = line.split("#")[0].split()
        assert program in ("pyro-sbp", "pip", "make", "torchrun", "python")
        if program != "pyro-sbp":
            continue
        options = {name for option in cli.commands[command].params for name in option.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


@pytest.mark.parametrize("name", PAGES)
def test_every_block_and_link_is_checked(name):
    languages = set(re.findall(r"^```(\w+)$", PAGES[name], flags=re.M))
    assert languages <= {"python", "toml", "sh", "math"}
    for link in re.findall(r"\]\(([^)#:]+)\)", PAGES[name]):
        assert (DOCS / link).exists(), link
    tested = {"method.md": 3, "limits.md": 2, "rbp.md": 1, "sparse_vd.md": 2, "regression.md": 7}
    tested |= {
        "own_network.md": 1,
        "distributions.md": 1,
        "criteria.md": 1,
        "budgets.md": 1,
        "pretrained_transformer.md": 1,
        "from_pyro.md": 1,
        "training_loops.md": 4,
        "hub.md": 2,
        "recipes.md": 1,
    }
    assert len(fenced(name, "python")) == tested.get(name, 0)


def test_the_index_lists_all_pages():
    listed = re.findall(r"^([\w/]+)$", PAGES["index.md"], flags=re.M)
    pages = [path.relative_to(DOCS) for path in DOCS.rglob("*") if path.suffix in (".md", ".ipynb")]
    names = {str(page.with_suffix("")) for page in pages if page.parts[0] != "_build"}
    assert set(listed) == names - {"index"} and len(listed) == len(set(listed))


@pytest.mark.parametrize("epochs", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_prune_your_own_network_with_pyro(epochs):
    """With one epoch of each kind, where little is removed, and as it is written."""
    (code,) = fenced("own_network.md", "python")
    if epochs is not None:
        code, loops = re.subn(r"(?<=in range\()\d+(?=\))|(?<=epochs=)\d+", str(epochs), code)
        assert loops == 3
    space = executed("own_network.md", [code])
    x, y = load_dataset("digits", image_size=28).test.batch(slice(None))
    if epochs is None:
        assert space["result"].macs_ratio > 3
        assert int(space["features"].sum()) < 800
        assert float((space["small"](x).argmax(1) != y).float().mean()) < 0.1
    assert not space["small"].training  # as `load` gives it
    assert torch.equal(space["same"](x), space["small"](x))
    assert space["low"].shape == (50,) and set(space["kept"]) == set(space["guide"].snr())
    assert space["features"].shape == (800,) and int(space["features"].sum()) > 0


@pytest.mark.slow
def test_the_distributions_in_your_own_model():
    space = page("distributions.md")
    assert (space["guide"].snr()["theta"] >= 1).tolist() == [True, False, True, False, False]
    # The deviations of a regression on the two features, with noise of variance 0.25.
    x, q = space["x"][:, [0, 2]], space["guide"].posteriors()["theta"]
    deviations = (0.25 * torch.linalg.inv(x.T @ x)).diagonal().sqrt()
    torch.testing.assert_close(q.stddev[[0, 2]].detach(), deviations, rtol=0.15, atol=0)
    assert space["samples"]["y"].shape == (100, 300)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_pretrained_transformer():
    pytest.importorskip("transformers")
    space = page("pretrained_transformer.md")
    example = {name: value[:1] for name, value in space["inputs"].items()}
    dense = count_macs(space["dense"], example)
    for ratio, small in space["ladder"].items():
        assert dense >= ratio * count_macs(small, example)


@pytest.mark.slow
def test_budgets():
    space = page("budgets.md")
    assert 10 * count_parameters(space["tenth"]) <= count_parameters(space["net"])
    assert space["error"](space["close"]) <= space["dense_error"] + 2
    assert count_macs(space["fast"], space["x"][:1]) < count_macs(space["net"], space["x"][:1])


def test_the_recipe_of_the_command_line(tmp_path):
    (text,) = fenced("command_line.md", "toml")
    (tmp_path / "mine.toml").write_text(text)
    assert read_recipe(tmp_path / "mine.toml").kl_scale == 4.0


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_whole_and_has_no_outputs(name):
    content = NOTEBOOKS[name]
    assert content["nbformat"] == 4 and content["nbformat_minor"] >= 5
    assert content["metadata"]["kernelspec"]["language"] == "python"
    identifiers = [cell["id"] for cell in content["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    for cell in content["cells"]:
        assert all(isinstance(line, str) for line in cell["source"])
        expected = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            expected |= {"outputs", "execution_count"}
        assert set(cell) == expected


@pytest.mark.slow
def test_own_model():
    space = notebook("own_model.ipynb")
    truth = space["truth"]
    assert torch.equal(space["found"], truth > 0)
    assert float((space["mean"] - truth)[truth > 0].abs().max()) < 0.05
    assert bool((space["low"] < space["high"]).all())
    assert space["draws"]["factor"].shape[0] == 300
    assert 0.85 < float(space["inside"]) < 0.96
    assert abs(float(space["draws"]["offset"].mean()) - 0.5) < 0.05
    # The normal site has a KL too.
    assert 0 < float(space["kl_by_signal"].sum()) <= float(space["parts"].kl)
    assert float(space["kl_by_signal"][truth > 0].min()) > float(
        space["kl_by_signal"][truth == 0].max()
    )


@pytest.mark.slow
def test_prune_your_network():
    space = notebook("prune_your_network.ipynb")
    x, y = space["x_test"], space["y_test"]
    assert [gate.name for gate in space["gates"]] == ["conv1", "conv2", "fc1"]
    assert space["dense_error"] < 4
    assert space["small_error"] < 5
    wrong = (space["small"](x).argmax(1) != y).float().mean()
    assert space["small_error"] == pytest.approx(100 * float(wrong))
    assert space["result"].macs_ratio > 3
    ratio = count_macs(space["net"], x[:1]) / count_macs(space["tiny"], x[:1])
    assert space["tiny_ratio"] == pytest.approx(ratio) and ratio >= 2 * space["result"].macs_ratio
    assert space["small"].conv1.out_channels == space["kept"]["conv1"]
    assert len(space["histograms"].axes) == 3
    with torch.no_grad():
        assert torch.equal(space["same"](x), space["small"](x))
    nll, kl = space["history"][-1]
    assert nll < 0.2 and kl < space["history"][0][1]
