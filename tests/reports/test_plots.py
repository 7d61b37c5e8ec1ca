"""plots: figures that show the numbers of a run, whichever page they stand on."""

import json
import math

import matplotlib
import pytest
import torch

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.method_recipes import SBPRecipe
from pyro_sbp.recipes.request import Request
from pyro_sbp.reports import plots
from pyro_sbp.reports.plots import Point, style
from pyro_sbp.training.checkpoints import Checkpoint, Place
from pyro_sbp.training.runs import Run

# log theta at -0.1 within 1 %: a ratio of 100; and spread over its whole range: of 1/3.
KEPT, REMOVED = (-0.1, -4.6), (-10.0, 4.9)
PIXELS = range(300, 400)
PHASES = ("dense", "dense", "gated", "gated")


def noise(size, kept):
    values = torch.tensor([KEPT if unit in kept else REMOVED for unit in range(size)])
    return values[:, 0], values[:, 1]


def write_run(directory, arch, gates, weights):
    """A run that was stopped with noise; `gates` has the size and the kept units of each."""
    request = Request(arch, "mnist", SBPRecipe(epochs=3))
    directory.mkdir()
    (directory / "recipe.json").write_text(json.dumps(request.to_dict()))
    lines = [
        {
            "phase": phase,
            "epoch": 1 + i % 2,
            "loss": 1.0 / (i + 1),
            "nll": 0.5 / (i + 1),
            "kl": 0.0 if phase == "dense" else 0.1,
            "weighted_kl": 0.0 if phase == "dense" else 0.5 / (i + 1),
            "error": 5.0 - i,
            "units": {name: size // (i + 1) for name, (size, _) in gates.items()},
            "seconds": 1.0,
        }
        for i, phase in enumerate(PHASES)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
    posteriors = {}
    for name, (size, kept) in gates.items():
        loc, log_scale = noise(size, kept)
        posteriors[name] = loc, log_scale.exp()
    Checkpoint(
        request=request,
        finished=[{"module": weights, "network": ""}],
        current={"module": {f"net.{n}": v for n, v in weights.items()}, "network": "net."},
        optimizer={},
        schedule={},
        place=Place(torch.zeros(1), torch.zeros(2), epoch=2),
        errors={},
        seconds=0.0,
        lines=lines,
        order=torch.zeros(1),
        random=[{"cpu": torch.get_rng_state()}],
        left_alone={},
        posteriors=posteriors,
    ).write(directory / "checkpoint.pt")
    return directory


@pytest.fixture
def dense_run(tmp_path):
    gates = {"fc1_input": (784, PIXELS), "fc1": (500, range(7))}
    return write_run(tmp_path / "dense", "lenet-500-300", gates, {"fc1.weight": torch.ones(2, 2)})


@pytest.fixture
def convolutional_run(tmp_path):
    gates = {"conv1": (20, (3, 11)), "conv2": (50, (1,))}
    weights = {"conv1.weight": torch.linspace(-1, 1, 500).reshape(20, 1, 5, 5)}
    return write_run(tmp_path / "convolutional", "lenet5", gates, weights)


class Ratios:
    """Anything with ratios, such as a guide or a posterior."""

    elements = "units"

    def __init__(self, **ratios):
        self.ratios = {name: torch.as_tensor(values) for name, values in ratios.items()}

    def snr(self):
        return self.ratios

    def scores(self, criterion):
        assert criterion == "snr"
        return self.ratios


FIXED = Ratios(a=[0.3, 0.5, 0.999, 1.0, 7.0], b=[0.4, 0.6])


def counts(ax, color):
    wanted = matplotlib.colors.to_rgba(color)
    return sum(bar.get_height() for bar in ax.patches if bar.get_facecolor() == wanted)


def test_the_histogram_parts_the_units_at_the_threshold():
    figure = plots.snr_histograms(FIXED)
    for ax, under, over in zip(figure.axes, (3, 2), (2, 0), strict=True):
        assert counts(ax, style.REMOVED) == under and counts(ax, style.LIGHT_CYCLE[0]) == over
        assert ax.get_xscale() == "log"
        (line,) = ax.lines
        assert set(line.get_xdata()) == {1.0}
        for bar in ax.patches:  # no bar lies across it
            assert bar.get_x() >= 1 - 1e-9 or bar.get_x() + bar.get_width() <= 1 + 1e-9
    ax = plots.snr_histograms(FIXED, threshold=0.55).axes[1]
    assert counts(ax, style.REMOVED) == counts(ax, style.LIGHT_CYCLE[0]) == 1


@pytest.mark.parametrize("threshold", [0.0, 1e-30, 1.0, 1e10])
@pytest.mark.parametrize(
    ("ratios", "drawn"),
    [
        ([0.0, 0.5, 2.0], 3),
        ([math.inf, 0.5, 2.0], 3),
        ([math.nan, 0.5, 2.0], 2),
        ([-1.0, 0.5], 2),
        ([1e-45, 1e30], 2),
        ([2.0], 1),
        ([2.0, 2.0], 2),
    ],
)
def test_every_ratio_is_in_the_histogram(threshold, ratios, drawn):
    figure = plots.snr_histograms(Ratios(a=ratios, empty=[]), threshold=threshold)
    plots.svg(figure)  # it can be drawn, too
    (ax,) = figure.axes
    over = sum(value >= threshold for value in ratios)
    assert counts(ax, style.LIGHT_CYCLE[0]) == over
    assert counts(ax, style.REMOVED) == drawn - over


def test_the_histogram_says_where_a_ratio_has_no_place_on_its_axis():
    def label(*ratios):
        return plots.snr_histograms(Ratios(a=ratios)).get_supxlabel()

    assert label(0.5, 2.0) == "signal-to-noise ratio"
    assert label(0.0, 2.0) == "signal-to-noise ratio (0 in the first bar)"
    assert label(0.5, math.inf).endswith("(infinity in the last bar)")
    assert label(0.5, math.nan).endswith("(NaN is not drawn)")


def test_a_posterior_of_zeros_is_drawn_where_there_is_a_threshold():
    (ax,) = plots.snr_histograms(Ratios(a=[0.0, 0.0])).axes
    assert counts(ax, style.REMOVED) == 2
    with pytest.raises(RequestError, match="no signal-to-noise ratio is positive and finite"):
        plots.snr_histograms(Ratios(a=[0.0, 0.0]), threshold=0.0)
    for nothing in (Ratios(), Ratios(a=[]), Ratios(a=[math.nan])):
        with pytest.raises(RequestError, match="no signal-to-noise ratio to draw"):
            plots.snr_histograms(nothing)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan, 2.0])
def test_pixels_of_any_ratio_are_drawn(value, dense_run, monkeypatch):
    ratios = torch.full((784,), 2.0)
    ratios[3] = value
    found = Ratios(fc1_input=ratios)
    monkeypatch.setattr("pyro_sbp.reports.posterior.read_posterior", lambda directory: found)
    figure = plots.kept_pixels(dense_run)
    plots.svg(figure)
    shown = figure.axes[1].images[0].get_array().flatten()
    assert bool(shown[3]) == (value >= 1) and shown.sum() == 783 + bool(value >= 1)


def test_a_figure_in_other_colours_gets_the_layout_of_its_twin():
    found = Ratios(first=[0.5, 2.0, 30.0], second=[0.1, 4.0])
    light, dark, alone = (plots.snr_histograms(found, dark=dark) for dark in (False, True, True))
    alone.get_layout_engine().execute(alone)
    style.lay_out(light, dark)
    assert light.get_layout_engine() is dark.get_layout_engine() is None
    assert len(dark.axes) == 2 and len(dark.texts) == len(alone.texts) > 0
    for ax, expected in zip(dark.axes, alone.axes, strict=True):
        place, own = (a.get_position(original=True).extents for a in (ax, expected))
        assert place == pytest.approx(own, abs=1e-6)
    for text, expected in zip(dark.texts, alone.texts, strict=True):
        assert text.get_position() == pytest.approx(expected.get_position(), abs=1e-6)


def test_filters_of_zeros_are_drawn(tmp_path):
    gates = {"conv1": (20, (3,)), "conv2": (50, (1,))}
    weights = {"conv1.weight": torch.zeros(20, 1, 5, 5)}
    plots.svg(plots.first_filters(write_run(tmp_path / "run", "lenet5", gates, weights)))


@pytest.mark.parametrize(
    "change",
    [
        {"loss": 0.0, "nll": 0.0, "weighted_kl": 0.0},
        {"loss": -1.0, "nll": -1.0},
        {"loss": math.nan, "nll": math.nan, "weighted_kl": math.nan},
        {"loss": math.inf},
        {"error": 0.0},
        {"units": {}},
        {"units": {"fc1": 0}},
    ],
)
@pytest.mark.parametrize("epochs", [1, 3])
def test_curves_of_any_values_are_drawn(change, epochs, dense_run):
    run = Run.read(dense_run)
    run.metrics[0].update(change)
    del run.metrics[epochs:]
    plots.svg(plots.training_curves(run))


def test_the_histogram_of_a_run_counts_its_units(dense_run):
    figure = plots.snr_histograms(dense_run)
    assert [counts(ax, style.LIGHT_CYCLE[0]) for ax in figure.axes] == [len(PIXELS), 7]
    assert [counts(ax, style.REMOVED) for ax in figure.axes] == [784 - len(PIXELS), 493]


def test_the_curves_are_those_of_the_metrics(dense_run):
    loss, error, units = plots.training_curves(dense_run).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in loss.lines}
    assert lines["loss"] == [1, 1 / 2, 1 / 3, 1 / 4]
    # There is no noise in the dense phase, and no zero on a logarithmic axis.
    assert all(map(math.isnan, lines["weighted KL"][:2]))
    assert lines["weighted KL"][2:] == lines["NLL"][2:]
    assert list(error.lines[0].get_ydata()) == [5, 4, 3, 2]
    shares = {line.get_label(): list(line.get_ydata()) for line in units.lines}
    assert shares["fc1"] == pytest.approx([100, 50, 100 * 166 / 500, 25])


def test_a_run_without_an_epoch_is_refused(dense_run):
    (dense_run / "metrics.jsonl").unlink()
    with pytest.raises(RequestError, match=r"no epoch in metrics\.jsonl yet"):
        plots.training_curves(dense_run)


def test_the_sweep_marks_the_recipe_s_threshold():
    rows = [
        {"threshold": t, "error": e, "ratio": r, "split": "test"}
        for t, e, r in ((0.0, 1.0, 1.0), (1.0, 1.2, 9.0), (2.0, 30.0, 40.0))
    ]
    (ax,) = plots.error_against_threshold(rows, 1.0).axes
    assert list(ax.lines[0].get_xdata()) == [1, 2]  # zero has no place there
    assert list(ax.lines[1].get_xdata()) == [1] and list(ax.lines[1].get_ydata()) == [1.2]
    (ax,) = plots.error_against_macs(rows, 1.0).axes
    assert list(ax.lines[0].get_xdata()) == [1, 9, 40]
    assert list(ax.lines[0].get_ydata()) == [1.0, 1.2, 30.0]


@pytest.mark.parametrize("change", [{"error": 0.0}, {"ratio": 1.0}, {"error": math.nan}])
def test_sweeps_of_any_values_are_drawn(change):
    row = {"threshold": 1.0, "error": 1.0, "ratio": 2.0, "split": "test"}
    for rows in ([{**row, **change}], [row, {**row, "threshold": 2.0, "error": 90.0, **change}]):
        plots.svg(plots.error_against_threshold(rows))
        plots.svg(plots.error_against_macs(rows))


@pytest.mark.parametrize("pruned", [(0, 0), (40, 0)])
@pytest.mark.parametrize("dense", [(400, 0), (400, 410), (0, 0)])
def test_layers_of_any_cost_are_drawn(dense, pruned, dense_run):
    plots.svg(plots.layer_costs(dense_run, {"fc1": {"dense": dense, "pruned": pruned}}))


#: A row of `bench.json`.
ROW = {
    "device": "cpu: x",
    "threads": 1,
    "batch_size": 8,
    "dense_ms": 4.0,
    "pruned_ms": 2.0,
    "speedup": 2.0,
    "spread": 0.1,
}


def test_a_latency_of_nanoseconds_is_drawn_and_one_that_cannot_be_is_refused(dense_run):
    (dense_run / "bench.json").write_text(json.dumps([{**ROW, "pruned_ms": 1e-5}]))
    plots.svg(plots.latency(dense_run))
    for impossible in (0.0, math.inf, math.nan):
        (dense_run / "bench.json").write_text(json.dumps([{**ROW, "pruned_ms": impossible}]))
        with pytest.raises(RequestError, match=r"bench.json is damaged: 0 pruned_ms is"):
            plots.latency(dense_run)


def test_layers_and_latencies_are_bars(dense_run):
    costs = {
        "fc1": {"dense": (400, 410), "pruned": (40, 44)},
        "": {"dense": (9, 0), "pruned": (0, 0)},
        "bn": {"dense": (0, 8), "pruned": (0, 4)},
    }
    macs, parameters = plots.layer_costs(dense_run, costs).axes
    assert [bar.get_width() for bar in macs.patches] == [400, 9, 40, 0]
    assert [bar.get_width() for bar in parameters.patches] == [410, 0, 44, 0]
    assert [label.get_text() for label in macs.get_yticklabels()] == ["fc1", "elsewhere"]
    costs["fc1"] = {"dense": (1_663_370, 8_000), "pruned": (20_500, 999)}
    macs, parameters = plots.layer_costs(dense_run, costs).axes
    assert [text.get_text() for text in macs.texts] == ["1.66M", "9", "20.5k", "0"]
    assert [text.get_text() for text in parameters.texts] == ["8k", "0", "999", "0"]
    with pytest.raises(RequestError, match=r"has no bench\.json; create it with pyro-sbp bench"):
        plots.latency(dense_run)
    (dense_run / "bench.json").write_text(json.dumps([ROW]))
    (ax,) = plots.latency(dense_run).axes
    assert [bar.get_width() for bar in ax.patches] == [0.004, 0.002]
    assert [text.get_text() for text in ax.texts] == ["4 ms", "2 ms"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["CPU, batch 8,\n1 thread"]
    # A row of an older file names no runtime.
    rows = [ROW, {**ROW, "runtime": "onnxruntime", "dense_ms": 1.0}]
    (dense_run / "bench.json").write_text(json.dumps(rows))
    (ax,) = plots.latency(dense_run).axes
    labels = [label.get_text().split("\n")[-1] for label in ax.get_yticklabels()]
    assert labels == ["eager", "onnxruntime"]
    assert [bar.get_width() for bar in ax.patches] == [0.004, 0.001, 0.002, 0.002]


def test_the_pixels_that_are_kept_lie_where_they_are(dense_run, convolutional_run):
    figure = plots.kept_pixels(dense_run)
    shown = figure.axes[1].images[0].get_array()
    assert shown.shape == (28, 28)
    assert shown.flatten().nonzero()[0].tolist() == list(PIXELS)
    with pytest.raises(RequestError, match="no noise on the pixels"):
        plots.kept_pixels(convolutional_run)


def test_the_filters_that_are_kept_are_shown(dense_run, convolutional_run):
    figure = plots.first_filters(convolutional_run)
    whole = torch.linspace(-1, 1, 500).reshape(20, 5, 5)
    shown = [torch.from_numpy(ax.images[0].get_array().data) for ax in figure.axes]
    assert len(shown) == 2
    assert torch.equal(shown[0], whole[3]) and torch.equal(shown[1], whole[11])
    with pytest.raises(RequestError, match="no noise on a first convolution"):
        plots.first_filters(dense_run)


def test_the_frontier_has_the_finished_runs_and_the_papers(dense_run, tmp_path):
    with pytest.raises(RequestError, match="no run has finished"):
        plots.frontier([dense_run])
    summary = {
        "error": {"dense": 1.4, "mean": 1.5, "pruned": 1.6, "finetuned": 1.3},
        "macs": {"dense": 1250, "pruned": 100, "ratio": 12.5},
        "parameters": {"dense": 1250, "pruned": 100, "ratio": 12.5},
        "units": [],
        "equivalence": {"max_rel_diff_float64": 0.0, "max_abs_diff": 0.0},
        **{"arch": "lenet-500-300", "dataset": "mnist", "method": "sbp", "device": "cpu"},
        **{"seed": 0, "epochs": 3, "train_seconds": 1.0},
    }
    (dense_run / "summary.json").write_text(json.dumps(summary))
    (ax,) = plots.frontier([dense_run, Run.read(dense_run)]).axes
    points = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in ax.lines}
    assert {(12.5, 1.3), (1.0, 1.4), (11.23, 1.55)} <= points
    assert {text.get_text() for text in ax.texts} >= {"dense", "SBP", "BB dropout"}


def test_a_frontier_leaves_out_what_has_no_place():
    point = Point("pyro-sbp", "a", 2.0, 1.0)
    for values in ((0.0, 1.0), (math.inf, 1.0), (2.0, math.nan)):
        other = Point("pyro-sbp", "b", *values)
        figure = plots.draw_frontier({"net": [point, other]})
        plots.svg(figure)
        assert [text.get_text() for text in figure.axes[0].texts] == ["a"]
        with pytest.raises(RequestError, match="net has no result that can be drawn"):
            plots.draw_frontier({"net": [other]})
    for values in ((1.0, 0.0), (0.5, 1.0)):
        plots.svg(plots.draw_frontier({"net": [Point("pyro-sbp", "b", *values)]}))


def luminance(color):
    """Relative luminance by WCAG 2."""
    parts = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in matplotlib.colors.to_rgb(color)
    ]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_a_figure_can_be_read_on_its_page(dark, dense_run):
    page, ink = style.DARK_PAGE if dark else style.LIGHT_PAGE
    cycle = style.DARK_CYCLE if dark else style.LIGHT_CYCLE
    assert contrast(page, ink) >= 7  # WCAG: text; graphics want 3
    assert all(contrast(page, color) >= 3 for color in (*cycle[:3], style.REMOVED))
    before = dict(matplotlib.rcParams)
    figure = plots.training_curves(dense_run, dark=dark)
    assert dict(matplotlib.rcParams) == before
    assert figure.get_facecolor() == matplotlib.colors.to_rgba(page)
    assert figure.axes[0].yaxis.label.get_color() == ink
    used = [line.get_color() for line in figure.axes[2].lines[:2]]
    assert used == list(cycle[:2])


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(style, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'pyro-sbp\[report\]'"):
        plots.snr_histograms(FIXED)
