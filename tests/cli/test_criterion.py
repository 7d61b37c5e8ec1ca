"""Runs that keep units by model reduction, and finished runs looked at and pruned by it."""

import json

import pytest
import torch
from helpers import METHODS, QUICK, run

from pyro_sbp.pruning.criteria import scores
from pyro_sbp.recipes.method_recipes import SparseVDRecipe
from pyro_sbp.recipes.request import Request
from pyro_sbp.reports.posterior import read_posterior

BMRS = ("bmrs-n", "bmrs-u")


def kept(directory, name="pruned"):
    """The kept units by gate, as the files of a network name them."""
    found = json.loads((directory / name / "units.json").read_text())
    return {gate: set(units["kept"]) for gate, units in found.items()}


def reached(directory, criterion, threshold):
    """The units whose score reaches a threshold, by gate."""
    posterior = read_posterior(directory)
    found = scores(posterior.sites, posterior.priors, criterion)
    return {n: set(torch.nonzero(x >= threshold).flatten().tolist()) for n, x in found.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run by bmrs-n, and one by RBP and the signal-to-noise ratio."""
    root = tmp_path_factory.mktemp("runs")
    args = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--device", "cpu"]
    for method, more in (("sbp", ["--criterion", "bmrs-n"]), ("rbp", [])):
        (root / "quick.toml").write_text(QUICK + METHODS[method])
        args[7:] = ["--recipe", root / "quick.toml", "--method", method, *more]
        result = run(*args, "--output-dir", root / method)
        assert result.exit_code == 0, result.output
    return root


def test_a_run_keeps_what_its_criterion_keeps(runs):
    recipe = json.loads((runs / "sbp" / "recipe.json").read_text())["recipe"]
    assert (recipe["criterion"], recipe["threshold"]) == ("bmrs-n", 0.919)
    found = kept(runs / "sbp")
    assert found == reached(runs / "sbp", "bmrs-n", 0.919)
    assert found != reached(runs / "sbp", "snr", 1.0)
    shown = json.loads(run("inspect", runs / "sbp", "--json").stdout)
    assert (shown["criterion"], shown["threshold"]) == ("bmrs-n", 0.919)
    assert {gate["gate"]: gate["kept"] for gate in shown["gates"]} == {
        name: len(units) for name, units in found.items()
    }


def test_a_run_can_be_pruned_by_another_criterion(runs):
    for options, name in (
        (["--criterion", "snr"], "pruned-snr"),
        (["--criterion", "bmrs-u"], "pruned-bmrs-u"),
        (["--criterion", "bmrs-n", "--threshold", "30"], "pruned-bmrs-n-threshold-30"),
        (["--threshold", "30"], "pruned-threshold-30"),
    ):
        result = run("prune", runs / "sbp", *options)
        assert result.exit_code == 0, result.output
        criterion = dict(zip(options[::2], options[1::2], strict=True)).get("--criterion", "bmrs-n")
        threshold = 30 if "30" in options else 1 if criterion == "snr" else 0.919
        assert kept(runs / "sbp", name) == reached(runs / "sbp", criterion, threshold)
    result = run("prune", runs / "sbp", "--macs-ratio", "8", "--json")
    assert json.loads(result.stdout)["macs"]["ratio"] >= 8


def test_what_recursion_has_kept_is_judged_by_its_posterior(runs):
    before = kept(runs / "rbp")
    for criterion in BMRS:
        # A threshold under which some of the kept units are.
        result = run("prune", runs / "rbp", "--criterion", criterion, "--threshold", "40")
        assert result.exit_code == 0, result.output
        over = reached(runs / "rbp", criterion, 40)
        expected = {name: units & over[name] for name, units in before.items()}
        assert kept(runs / "rbp", f"pruned-{criterion}-threshold-40") == expected != before


@pytest.mark.slow
def test_inspect_and_report_show_another_criterion(runs):
    text = run("inspect", runs / "sbp", "--criterion", "bmrs-u").stdout
    assert "; by bmrs-u" in text and "-dF_U median" in text and "(-dF_U) below 0.919" in text
    shown = json.loads(run("inspect", runs / "sbp", "--criterion", "snr", "--json").stdout)
    for gate in shown["gates"]:
        assert gate["score"] == gate["snr"] and gate["zeroed"] is None
    result = run("report", runs / "sbp", "--criterion", "bmrs-u")
    assert result.exit_code == 0, result.output
    page = (runs / "sbp" / "report.html").read_text()
    assert "Units with a log Bayes factor of BMRS_U (-dF_U) of 0.919 or more are kept." in page
    assert "The network at other thresholds on the log Bayes factor of BMRS_U" in page
    assert "No picture" not in page and "(the recipe" not in page


def test_what_a_criterion_cannot_do_is_refused_in_one_line(runs, tmp_path):
    recipe = SparseVDRecipe()
    request = Request("lenet-300-100", "digits", recipe).to_dict()
    (tmp_path / "recipe.json").write_text(json.dumps(request))
    (tmp_path / "summary.json").write_text("{}")
    quick = ["train", "--arch", "lenet-300-100", "--dataset", "digits"]
    for args, words in (
        (["prune", runs / "sbp", "--criterion", "bmrs-u", "--macs-ratio", "4"], "does not give"),
        (["prune", runs / "sbp", "--criterion", "bmrs"], "unknown criterion 'bmrs'"),
        (["prune", runs / "sbp", "--criterion", "snr", "--threshold", "-1"], "ratio >= 0"),
        (["prune", runs / "sbp"], "give --threshold"),
        (["prune", tmp_path, "--criterion", "bmrs-n"], "is for noise on units"),
        ([*quick, "--criterion", "bmrs"], "criterion 'bmrs'"),
        (
            [*quick, "--method", "sparse-vd", "--criterion", "bmrs-n"],
            "'criterion' is a setting of sbp and rbp, not of sparse-vd",
        ),
    ):
        result = run(*args)
        assert result.exit_code == 2 and words in result.stderr, result.output
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_run_of_an_earlier_version_has_the_ratio():
    values = Request("lenet-300-100", "digits", SparseVDRecipe()).to_dict()
    values["method"], values["recipe"] = "sbp", {"name": "default", "threshold": 1.5}
    rule = Request.from_dict(values).recipe.rule()
    assert (rule.criterion.name, rule.threshold) == ("snr", 1.5)
