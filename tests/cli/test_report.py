"""pyro-sbp report: one page that needs nothing else, in process and in a browser."""

import json
import shutil
import socket
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser
from helpers import run

from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.errors import RequestError
from pyro_sbp.reports.findings import costs_of
from pyro_sbp.reports.plots import style
from pyro_sbp.training import again
from pyro_sbp.training.runs import Run

QUICK = """
dense_epochs = 1
epochs = 3
init_log_scale = -1.0
finetune_epochs = 1
batch_size = 64
noise_learning_rate = 0.1
"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    (root / "quick.toml").write_text(QUICK)
    args = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--device", "cpu"]
    result = run(*args, "--recipe", root / "quick.toml", "--output-dir", root / "run")
    assert result.exit_code == 0, result.output
    row = {"device": "cpu: x", "threads": 1, "batch_size": 8, "dense_ms": 4.0, "pruned_ms": 2.0}
    row |= {"speedup": 2.0, "spread": 0.01, "floor_ms": 1.0}
    (root / "run" / "bench.json").write_text(json.dumps([row, row | {"runtime": "compile"}]))
    return root / "run"


def refuse(*args, **kwargs):
    raise AssertionError("the report asked for the network")


@pytest.fixture(scope="module")
def reported(finished):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        result = run("report", finished)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"report: {finished / 'report.html'}\n"
    return finished / "report.html"


@pytest.fixture
def stopped(finished, tmp_path):
    """The same as it stands while it is trained: without what comes at the end."""
    ignore = shutil.ignore_patterns("pruned", "report*")
    shutil.copytree(finished, tmp_path / "stopped", ignore=ignore)
    for name in ("summary.json", "bench.json"):
        (tmp_path / "stopped" / name).unlink()
    return tmp_path / "stopped"


class Page(HTMLParser):
    """The tables, headings, pictures and words of a page, and the tags that are not closed."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.headings, self.images, self.open = [], [], [], []
        self.tags, self.references, self.words = set(), [], ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        values = dict(attributes)
        self.references += [v for k, v in values.items() if k in ("src", "srcset", "href")]
        if tag == "img":
            self.images.append(values)
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words += data
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)

    def table(self, first):
        (found,) = [table for table in self.tables if table[0][0] == first]
        return found


def test_the_page_has_the_numbers_of_the_run(finished, reported):
    page = Page(reported)
    assert not page.open
    summary = json.loads((finished / "summary.json").read_text())
    errors = {row[0]: row[1] for row in page.table("network")[1:]}
    assert errors["pruned"] == f"{summary['error']['pruned']:.2f}"
    assert errors["fine-tuned"] == f"{summary['error']['finetuned']:.2f}"
    (units,) = [t for t in page.tables if t[0][:3] == ["gate", "kept", "of"]]
    assert [(row[0], int(row[1]), int(row[2])) for row in units[1:]] == [
        (unit["gate"], unit["kept"], unit["total"]) for unit in summary["units"]
    ]
    (layers,) = [t for t in page.tables if t[0][:2] == ["layer", "MACs, dense"]]
    for column, whole in ((1, "dense"), (2, "pruned")):
        macs = sum(int(row[column].replace(",", "")) for row in layers[1:])
        assert macs == summary["macs"][whole]
    assert page.table("phase")[-1][0] == "finetuned"
    assert [row[:3] for row in page.table("device")] == [
        ["device", "runtime", "threads"],
        ["cpu: x", "eager", "1"],
        ["cpu: x", "compile", "1"],
    ]
    (alt,) = [image["alt"] for image in page.images if "per call" in image["alt"]]
    assert "cpu: x, compile, batch 8, 1 threads: 2.00x" in alt


def test_nothing_is_fetched_and_every_picture_has_words(finished, reported):
    page = Page(reported)
    assert "script" not in page.tags and "link" not in page.tags
    assert page.references and all(r.startswith("data:image/svg+xml;") for r in page.references)
    assert all(len(image["alt"]) > 40 for image in page.images)
    files = {path.name for path in (finished / "report").iterdir()}
    names = "error-macs error-threshold latency layers pixels snr training"
    assert files == {f"{name}.png" for name in names.split()}
    assert len(page.images) == len(files)
    for path in (finished / "report").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_sweep_has_the_numbers_of_prune(finished):
    found = Run.read(finished)
    data = load_dataset("digits", Path("nowhere"), 28)
    rows = again.sweep(found.request, data, finished)
    assert [row["threshold"] for row in rows] == sorted({row["threshold"] for row in rows})
    assert 1.0 in [row["threshold"] for row in rows] and len(rows) >= 5
    row = rows[4]
    result = run("prune", finished, "--threshold", row["threshold"], "--json")
    shutil.rmtree(finished / f"pruned-threshold-{row['threshold']:g}")
    summary = json.loads(result.stdout)
    assert row["error"] == summary["error"]["pruned"]
    assert (row["macs"], row["ratio"]) == (summary["macs"]["pruned"], summary["macs"]["ratio"])
    assert row["parameters"] == summary["parameters"]["pruned"]
    assert row["units"] == {u["gate"]: u["kept"] for u in summary["units"]}
    macs = [row["macs"] for row in rows]
    assert macs == sorted(macs, reverse=True) and macs[0] == summary["macs"]["dense"]
    (largest,) = again.sweep(found.request, data, finished, thresholds=(1e9,))
    assert largest["units"] == dict.fromkeys(row["units"], 1)
    assert largest["held"] == list(row["units"])
    with pytest.raises(RequestError, match="expected a signal-to-noise ratio >= 0"):
        again.sweep(found.request, data, finished, thresholds=(-1.0,))


def test_what_was_held_out_is_what_a_sweep_measures(tmp_path):
    (tmp_path / "quick.toml").write_text(QUICK + "holdout = 300\n")
    args = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--device", "cpu"]
    result = run(*args, "--recipe", tmp_path / "quick.toml", "--output-dir", tmp_path / "run")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation_error"].keys() == summary["error"].keys()
    found = Run.read(tmp_path / "run")
    rows = again.sweep(found.request, load_dataset("digits", Path("nowhere"), 28), found.directory)
    assert {row["split"] for row in rows} == {"validation"}
    row = rows[5]
    result = run("prune", tmp_path / "run", "--threshold", row["threshold"], "--json")
    assert row["error"] == json.loads(result.stdout)["validation_error"]["pruned"]
    # In three hundredths: there are so many images.
    assert row["error"] * 3 == pytest.approx(round(row["error"] * 3), abs=1e-4)
    assert run("report", tmp_path / "run").exit_code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "measured on the 300 training images that are reserved for validation" in page
    assert "validation error" in page


def test_the_layers_sum_to_the_network(finished):
    summary = json.loads((finished / "summary.json").read_text())
    costs = costs_of(Run.read(finished))
    assert list(costs) == ["fc1", "fc2", "fc3"]
    assert costs["fc1"]["dense"] == (784 * 300, 784 * 300 + 300)
    for part in ("dense", "pruned"):
        macs, parameters = (sum(cost[part][i] for cost in costs.values()) for i in (0, 1))
        assert (macs, parameters) == (summary["macs"][part], summary["parameters"][part])


def test_an_unfinished_run_tells_what_there_is_in_the_same_bytes(stopped):
    pages = []
    for _ in range(2):
        assert run("report", stopped).exit_code == 0
        pages.append((stopped / "report.html").read_bytes())
    assert pages[0] == pages[1]
    page = Page(stopped / "report.html")
    assert "This run has not finished" in page.words and "--resume" in page.words
    assert page.headings[1:] == ["Units", "Training", "Settings and machine"]
    (stopped / "checkpoint.pt").unlink()
    (stopped / "metrics.jsonl").unlink()
    assert run("report", stopped).exit_code == 0
    page = Page(stopped / "report.html")
    assert "has not finished its first epoch" in page.words and page.images == []
    assert "No posterior" in page.words and list((stopped / "report").iterdir()) == []


def test_several_runs_are_compared_and_what_is_missing_is_said(finished, stopped, tmp_path):
    first = tmp_path / "first"
    shutil.copytree(finished, first)
    recipe = json.loads((first / "recipe.json").read_text())
    recipe["dataset"] = "mnist"  # of which there are published results
    (first / "recipe.json").write_text(json.dumps(recipe))
    (first / "bench.json").unlink()
    result = run("report", first, stopped, "--data-dir", tmp_path / "none")
    assert result.exit_code == 0, result.output
    page = Page(first / "report.html")
    rows = page.table("run")[1:]
    assert [row[0] for row in rows] == ["first", "stopped"]
    assert [row[5] == "not finished" for row in rows] == [False, True]
    assert f"Not measured: mnist is not under {tmp_path / 'none'}" in page.words
    assert f"pyro-sbp bench {first} measures it" in page.words
    assert "VIBNet" in [row[0] for row in page.table("method")]
    files = {path.name for path in (first / "report").iterdir()}
    assert files >= {"frontier.png", "first-snr.png", "stopped-snr.png"}
    assert not (stopped / "report.html").exists()


def test_refusals_are_one_line_and_write_nothing(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn").mkdir()
    shutil.copy(finished / "recipe.json", tmp_path / "torn")
    (tmp_path / "torn" / "metrics.jsonl").write_text('{"phase": "dense", "ep')
    for args, words in (
        ([], "there is no run under runs/"),
        (["nowhere"], "there is no directory nowhere"),
        (["torn"], "metrics.jsonl is damaged"),
    ):
        result = run("report", *args)
        assert result.exit_code == 2 and words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    monkeypatch.setattr(style, "find_spec", lambda name: None)
    (tmp_path / "torn" / "metrics.jsonl").unlink()
    result = run("report", "torn")
    assert result.exit_code == 2 and "pip install 'pyro-sbp[report]'" in result.stderr
    assert [path.name for path in (tmp_path / "torn").iterdir()] == ["recipe.json"]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
def test_a_browser_draws_the_page_and_asks_for_nothing(reported, tmp_path):
    browser = Browser(CHROMIUM, tmp_path / "profile")
    try:
        backgrounds = set()
        for scheme, width in (("light", 1200), ("dark", 1200), ("light", 375), ("dark", 375)):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.call("Emulation.setEmulatedMedia", features=[feature])
            browser.call(
                "Emulation.setDeviceMetricsOverride",
                width=width, height=800, deviceScaleFactor=1, mobile=width < 500,
            )  # fmt: skip
            browser.open(reported.as_uri())
            drawn = browser.value(
                "Promise.all(Array.from(document.images, i => i.decode().then("
                "() => [i.naturalWidth, i.getBoundingClientRect().width, i.currentSrc.length])))"
            )
            assert len(drawn) == len(Page(reported).images)
            assert all(natural > 0 and 0 < shown <= width for natural, shown, _ in drawn)
            # A phone scrolls the page up and down only; wide tables scroll in themselves.
            assert browser.value("document.documentElement.scrollWidth") <= width
            backgrounds.add((scheme, browser.value("getComputedStyle(document.body).background")))
            asked = [
                event["request"]["url"] for event in browser.named("Network.requestWillBeSent")
            ]
            assert [url for url in asked if not url.startswith("data:")] == [reported.as_uri()]
            assert browser.named("Log.entryAdded") == []
            assert browser.named("Runtime.exceptionThrown") == []
            assert browser.named("Runtime.consoleAPICalled") == []
        assert len(backgrounds) == 2 and len({color for _, color in backgrounds}) == 2
    finally:
        browser.close()
