"""The figure of the method page shows distributions with the stated moments."""

import math

import pytest
from scipy import integrate, stats

from pyro_sbp.experiments import prior_figure
from pyro_sbp.reports.plots import style


def _by_quadrature(density):
    """The mean, the standard deviation and the SNR of exp(t) for a density of t on [-20, 0]."""
    mass, first, second = (
        integrate.quad(lambda t, k=k: math.exp(k * t) * density(t), -20, 0, limit=200)[0]
        for k in range(3)
    )
    mean = first / mass
    stddev = math.sqrt(second / mass - mean**2)
    return mean, stddev, mean / stddev


def test_the_moments_are_those_of_quadrature():
    found = prior_figure.moments()
    expected = {"prior": _by_quadrature(lambda t: 1.0)}
    for title, (loc, scale) in prior_figure.POSTERIORS.items():
        expected[title] = _by_quadrature(stats.norm(loc, scale).pdf)
    assert list(found) == list(expected)
    for title, values in found.items():
        assert values == pytest.approx(expected[title], rel=1e-6), title


def test_the_removed_unit_is_under_the_threshold_and_the_kept_one_over_it():
    snr = {title: values[2] for title, values in prior_figure.moments().items()}
    assert snr["posterior of a removed unit"] < 1 < snr["posterior of a kept unit"]


def test_it_is_drawn_for_a_checkout_with_its_page_and_when_it_is_old(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert prior_figure.out_of_date(tmp_path) == []
    page = tmp_path / prior_figure.PAGE
    page.parent.mkdir()
    page.write_text("")
    files = list(prior_figure.FILES)
    assert prior_figure.out_of_date(tmp_path) == files
    prior_figure.draw(tmp_path, files)
    assert prior_figure.out_of_date(tmp_path) == []
    for name, dark in prior_figure.FILES.items():
        color = (style.DARK_PAGE if dark else style.LIGHT_PAGE)[0]
        assert color in (tmp_path / name).read_text("utf-8")
    monkeypatch.setitem(prior_figure.POSTERIORS, "posterior of a kept unit", (-0.5, 0.25))
    assert prior_figure.out_of_date(tmp_path) == files
