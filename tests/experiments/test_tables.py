"""Tables and figures of the README and docs, made of the records."""

import json
from pathlib import Path

import pytest

from pyro_sbp.errors import RequestError
from pyro_sbp.experiments import network_tables
from pyro_sbp.experiments.rows import Record, read_records, rows
from pyro_sbp.experiments.tables import main, rebuilt
from pyro_sbp.recipes.method_recipes import SBPRecipe
from pyro_sbp.recipes.named import RECIPES
from pyro_sbp.reports import plots
from pyro_sbp.reports.plots import style

ROOT = Path(__file__).parents[2]


def made_up(seed, error, recipe="lenet5", method="sbp", arch="lenet5", ratio=10.0, **others):
    """A record of a run, which handed over a network that was not fine-tuned."""
    settings = RECIPES[recipe] if recipe in RECIPES else SBPRecipe()
    return {
        "settings": settings.to_dict(),
        "arch": arch,
        "dataset": "mnist",
        "method": method,
        "seed": seed,
        "train_seconds": 60.0 * (seed + 1),
        "error": {"dense": 0.6 + seed / 10, "mean": 9.0, "pruned": error, "finetuned": None},
        "units": [
            {"gate": "conv1", "kept": 5 + seed, "total": 20},
            {"gate": "fc1_input", "kept": 100, "total": 800},
        ],
        "macs": {"dense": 2_293_000, "pruned": 1, "ratio": ratio + seed},
        "recipe": recipe,
        "command": f"pyro-sbp train --arch {arch} --dataset mnist --seed {seed}",
        "versions": {"torch": "2.11"},
        "machine": "a machine",
        **others,
    }


def baseline(seed, error, target="experiments/results/lenet5-mnist-lenet5-{}.json"):
    kept = made_up(seed, 9.0)
    del kept["recipe"]
    return {
        **kept,
        "method": "torch-pruning taylor",
        "command": f"python -m pyro_sbp.experiments.baselines {target.format(seed)}",
        "steps": 10,
        "kind": "baseline",
        "of": "lenet5",
        "error": {"dense": 0.7, "pruned": 30.0, "finetuned": error},
        "epochs": {"dense": 8, "finetuned": 22},
    }


def recursive(seed, recipe="rbp-lenet5", longer=0):
    units = {"conv1": 5 + longer, "fc1_input": 100}
    alike = {"epochs": 11, "units": units, "seconds_per_epoch": 2 + longer}
    phases = [
        {"phase": name, "error": error + seed, **alike}
        for name, error in (("dense", 0.5), ("gate conv1", 0.75))
    ]
    return made_up(seed, 0.9, recipe, "rbp", ratio=12.0, phases=phases)


OURS = [made_up(0, 0.7), made_up(2, 0.9), made_up(1, 0.74)]


def checkout(path, records, readme, **pages):
    """A checkout of made-up records, with the pages given."""
    (path / "docs").mkdir()
    results = path / "experiments" / "results"
    results.mkdir(parents=True)
    for index, record in enumerate(records):
        (results / f"{index}.json").write_text(json.dumps(record))
    (path / "README.md").write_text(readme)
    for name, text in pages.items():
        (path / "docs" / f"{name}.md").write_text(text)
    return path


def block(words, inside=""):
    return f"Before.\n\n<!-- table: {words} -->\n{inside}<!-- end -->\n\nAfter.\n"


def table(words, records):
    """What stands in a block."""
    text, _ = rebuilt("page.md", block(words), [Record.of(record) for record in records])
    before, after = f"Before.\n\n<!-- table: {words} -->\n\n", "\n\n<!-- end -->\n\nAfter.\n"
    assert text.startswith(before) and text.endswith(after)
    return text.removeprefix(before).removesuffix(after).split("\n")


def test_the_tables_and_figures_of_this_checkout_are_those_of_its_records(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_a_page_is_rebuilt_once_and_what_is_old_is_told(tmp_path, capsys):
    root = checkout(tmp_path, OURS, block("headline lenet5 lenet5"), other="No table.\n")
    before = (root / "README.md").read_bytes()
    assert main(["--check"], root) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines] == [
        "README.md:3:", "docs/frontier.svg:", "docs/frontier-dark.svg:",
    ]  # fmt: skip
    assert (root / "README.md").read_bytes() == before and len(list((root / "docs").iterdir())) == 1

    assert main([], root) == 0
    text = (root / "README.md").read_text()
    ours = "| SBP, `lenet5`, seeds 0 to 2 | 0.70 | 0.74 (0.70 to 0.90) | 6-100 | 11.00x |"
    assert ours in text.splitlines()
    assert text.startswith("Before.\n\n<!-- table") and text.endswith("<!-- end -->\n\nAfter.\n")
    written = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["--check"], root) == 0 and main([], root) == 0
    assert capsys.readouterr().out == ""
    assert {path: path.read_bytes() for path in written} == written

    (root / "experiments/results/3.json").write_text(json.dumps(made_up(3, 0.8)))
    assert main(["--check"], root) == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("README.md:3: table headline lenet5 lenet5: out of date: ")
    new = ours.replace("0 to 2", "0 to 3").replace("0.74 (", "0.77 (").replace("0.70 |", "0.75 |")
    assert f"the page has {ours!r}" in line
    assert new.replace("11.00", "11.50") in line


def test_a_network_stands_beside_papers():
    lines = table("network lenet5", [*OURS, baseline(0, 1.2)])
    assert lines[2] == "| dense, Neklyudov et al. 2017 | - | 0.80 | 20-50-800-500 | 1x | |"
    ratios = [float(line.split(" | ")[4].removesuffix("x")) for line in lines[2:]]
    assert ratios == sorted(ratios)
    assert (
        "| **SBP, `lenet5`** | 0 to 2 | 0.74 (0.70 to 0.90) | 6-100 | 11.00x | dense 0.70 |"
        in lines
    )
    assert table("network lenet5 mnist", OURS) == lines
    shifted = made_up(0, 0.5, "lenet-300-100-28x", arch="lenet-300-100", ratio=28.0)
    (line,) = (x for x in table("network lenet-300-100", [shifted]) if "28x" in x)
    assert line.endswith("| 28.00x | dense 0.60, images shifted by at most 1 pixel |")
    # Labels drawn at random say nothing of how good a network is.
    random = made_up(0, 90.0, "random", training_error={"dense": None})
    assert table("network lenet5", [*OURS, random]) == table("network lenet5", OURS)


def test_baselines_stand_below_the_recipe_whose_macs_they_have():
    other = {**baseline(0, 1.0), "method": "torch-pruning magnitude"}
    records = [*OURS, made_up(0, 0.6, "other"), baseline(0, 1.2), baseline(1, 1.3), other]
    records.append(baseline(0, 1.2, "--recipe lenet5 --seed {} 40"))  # of a ratio of its own
    assert table("baselines lenet5 lenet5", records)[2:] == [
        "| **SBP, `lenet5`** | 0 to 2 | 0.70 | 0.74 (0.70 to 0.90) | 6-100 | 11.00x |",
        "| torch-pruning magnitude, 10 steps | 0 | 0.70 | 1.00 | 5-100 | 10.00x |",
        "| torch-pruning taylor, 10 steps | 0, 1 | 0.70 | 1.25 (1.20 to 1.30) | 6-100 | 10.50x |",
    ]
    with pytest.raises(RequestError, match="no baseline of lenet5 on mnist is of 'other'"):
        table("baselines lenet5 other", records)


def test_the_error_is_that_of_the_network_handed_over():
    tuned = made_up(0, 0.7)
    tuned["error"]["finetuned"] = 0.5
    assert [row.error_in_words for row in rows([Record.of(tuned)])] == ["0.50"]
    assert [row.error_in_words for row in rows([Record.of(made_up(0, 0.7))])] == ["0.70"]


def test_commands_are_told_once_a_row_with_where_they_ran():
    other = made_up(1, 0.8, machine="another", versions={"torch": "2.15"})
    by_ratio = [baseline(0, 1.2, f"--recipe lenet5 --seed {{}} {ratio}") for ratio in (10, 20)]
    ours = [made_up(0, 0.7), other, made_up(4, 0.8)]
    lines = table("commands", [*ours, baseline(0, 1.2), baseline(1, 1.2), *by_ratio])
    command = "`pyro-sbp train --arch lenet5 --dataset mnist --seed N`"
    assert lines[2] == f"| LeNet-5, SBP, `lenet5` | {command} | 0, 1, 4 | 2.0 | 1, 2; A, B |"
    assert "baselines experiments/results/lenet5-mnist-lenet5-N.json` | 0, 1 | 1.5 |" in lines[3]
    assert "baselines --recipe lenet5 --seed N 10` | 0 | 1.0 | 1; A |" in lines[4]
    assert "baselines --recipe lenet5 --seed N 20` | 0 |" in lines[5]
    (line,) = table("commands", [made_up(100, 1.5, "lenet-dense", arch="lenet-300-100")])[2:3]
    assert "--arch lenet-300-100 --dataset mnist --seed N` | 100 |" in line
    before = "pyro-sbp train --arch lenet5 --dataset mnist --recipe other --seed 0"
    (line,) = table("commands", [made_up(0, 0.7, started_from=before)])[2:3]
    assert f"| `{before[:-1]}N`, then {command} | 0 |" in line
    assert lines[7:] == [
        "- Machine 1: a machine.", "- Machine 2: another.",
        "- Versions A: torch 2.11.", "- Versions B: torch 2.15.",
    ]  # fmt: skip


def test_random_labels_are_told_with_what_was_left_and_memorised():
    phases = [
        {"phase": "gated", "units": {"conv1": 2, "fc1_input": 0}},
        {"phase": "finetuned", "units": {"conv1": 2, "fc1_input": 1}},
    ]

    def random(seed, error, recipe, **training_error):
        told = {"mean": 90.0, "pruned": 88.0, "finetuned": None, **training_error}
        entry = made_up(seed, error, recipe, training_error=told, phases=phases)
        entry["error"]["dense"] = None if told["dense"] is None else 89.0 + seed
        return entry

    records = [
        random(0, 70.0, "dropout", dense=2.0),
        random(1, 70.0, "dropout", dense=4.0),
        random(0, 90.0, "random", dense=None),
        random(1, 91.0, "random", dense=None, finetuned=84.0),
    ]
    assert table("random-labels", [*OURS, *records])[2:] == [
        "| LeNet-5 on MNIST, dense training, `dropout` | 0, 1 | 20-800 of 20-800 | 3.0 | 89.5 |",
        "| LeNet-5 on MNIST, SBP, `random` | 0, 1 | 2-0 of 20-800 | 86.0 | 90.5 |",
    ]


def test_recursive_pruning_turn_by_turn_and_beside_sbp():
    records = [
        made_up(0, 0.7, phases=recursive(0)["phases"][:1]),
        recursive(0),
        recursive(1, longer=1),
        recursive(9, longer=10),
        recursive(0, "rbp-lenet-dense-reversed"),
    ]
    lines = table("recursion lenet5", records)
    assert lines[0].startswith("lenet5, mnist, rbp, recipe rbp-lenet5, seeds 0, 1, 9: 13.0 times")
    assert "| gate conv1 | 11 | 1.75 | 6-100 | 3.0 |" in lines
    assert sum("recipe" in line for line in lines) == 2
    (of_one,) = (line for line in table("recursion lenet5 rbp-lenet5", records) if "recipe" in line)
    assert of_one == lines[0]
    assert not any(", sbp, " in line for line in lines) and lines[-1].startswith("| gate conv1")
    names = "rbp-lenet-dense-reversed lenet5 rbp-lenet5"
    assert table(f"compare lenet5 {names}", records)[2:] == [
        "| RBP, `rbp-lenet-dense-reversed` | reversed | 0 | 0.90 | 5-100 | 12.00x | 1.0 | 60 |",
        "| SBP, `lenet5` | - | 0 | 0.70 | 5-100 | 10.00x | 1.0 | 40 |",
        "| RBP, `rbp-lenet5` | forward | 0, 1, 9 | 0.90 (0.90 to 0.90) | 6-100 | 13.00x | 2.0 "
        "| 30 |",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            block("networks lenet5"),
            "README.md:3: table networks lenet5: no table is called 'networks'; did you mean",
        ),
        (block(""), "README.md:3: table : no table is called ''; expected one of network, "),
        ("<!-- table: recipes -->\nA.\n", "README.md:1: table recipes has no <!-- end --> after"),
        ("<!-- table: recipes -->\n" + block("recipes"), "README.md:1: table recipes has no <!-- "),
        ("A.\n<!-- end -->\n", "README.md:2: an end without a table before it"),
        (block("network vgg-like"), "no record of vgg-like on cifar10 is in experiments/results"),
        (block("recursion"), "wrong words after its name: missing a required argument: 'arch'"),
        (block("recipes lenet5"), "wrong words after its name: too many positional arguments"),
        (block("recursion lenet6"), "unknown network 'lenet6'; expected lenet-500-300, "),
        (block("recursion lenet5"), "no record of lenet5 on mnist by rbp has its phases"),
        (
            block("recursion lenet5 rbp"),
            "no record of lenet5 on mnist by rbp with the recipe rbp has its phases",
        ),
        (block("compare lenet5"), "compare lenet5 names no recipe: compare lenet5 RECIPE ..."),
        (block("sparse-vd"), "no record of lenet-300-100 on mnist is in experiments/results"),
        (block("random-labels"), "no record of random labels is in experiments/results"),
        (block("headline lenet5"), "headline lenet5 names no recipe: headline lenet5 RECIPE ..."),
        (block("headline lenet5 digits"), "no record of lenet5 on mnist has the recipe 'digits'"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(tmp_path, capsys, text, words):
    root = checkout(tmp_path, OURS, text)
    for arguments in ([], ["--check"]):
        assert main(arguments, root) == 1
        told = capsys.readouterr()
        assert words in told.err and told.err.count("\n") == 1 and told.out == ""
    assert (root / "README.md").read_text() == text and not list((root / "docs").iterdir())


def test_what_is_no_checkout_or_no_record_is_refused(tmp_path, capsys):
    assert main([], tmp_path) == 1
    assert "has no README.md; tables are rebuilt in a checkout" in capsys.readouterr().err
    results = checkout(tmp_path, OURS, "").joinpath("experiments/results")
    for content, words in (
        ("{", "is not a record: Expecting"),
        ("[]", "is not a record: 'list' object has no attribute 'get'"),
        ('{"error": {}}', "is not a record: lacks 'finetuned'"),
    ):
        (results / "9.json").write_text(content)
        with pytest.raises(RequestError, match=f"9.json {words}"):
            read_records(results)
    (results / "9.json").write_text(json.dumps(OURS[0]))
    with pytest.raises(RequestError, match="seed 0 of lenet5 on mnist by sbp, lenet5 is recorded"):
        rows(read_records(results))


def test_figures_are_old_by_their_numbers_alone(tmp_path, capsys, monkeypatch):
    root = checkout(tmp_path, [*OURS, baseline(0, 1.2)], "")
    light, dark = root / "docs" / "frontier.svg", root / "docs" / "frontier-dark.svg"
    assert main([], root) == 0
    drawn = light.read_bytes()
    assert (
        style.LIGHT_PAGE[0].encode() in drawn and style.DARK_PAGE[0].encode() in dark.read_bytes()
    )
    light.unlink()
    assert main([], root) == 0 and light.read_bytes() == drawn
    # As another Matplotlib draws it.
    light.write_bytes(drawn.replace(b"<path", b"<path  "))
    assert main(["--check"], root) == 0 and main([], root) == 0 and light.read_bytes() != drawn

    record = root / "experiments/results/0.json"
    record.write_text(json.dumps(made_up(0, 0.69)))
    capsys.readouterr()
    assert main(["--check"], root) == 1
    assert "docs/frontier.svg: out of date: " in capsys.readouterr().out
    monkeypatch.setattr(style, "find_spec", lambda name: None)
    assert main([], root) == 1
    assert "pip install 'pyro-sbp[report]'" in capsys.readouterr().err


def test_the_picture_has_papers_medians_spreads_and_baselines():
    from pyro_sbp.experiments.frontier import panels

    records = [Record.of(record) for record in [*OURS, baseline(0, 1.2)]]
    drawn = panels([*records, Record.of(made_up(0, 1.0, "x", arch="lenet-500-300"))])
    assert list(drawn) == ["LeNet-500-300 on MNIST", "LeNet-5 on MNIST"]
    points = drawn["LeNet-5 on MNIST"]
    assert plots.Point("published", "SBP", 10.78, 0.86) in points
    assert plots.Point("pyro-sbp", "lenet5", 11.0, 0.74, (0.7, 0.9)) in points
    assert plots.Point("baselines", "taylor", 10.0, 1.2) in points
    first, second = plots.draw_frontier(drawn, columns=2).axes
    assert second.get_title(loc="left") == "LeNet-5 on MNIST"
    (bar,) = second.collections
    (path,) = bar.get_paths()
    assert path.vertices[:, 1].tolist() == pytest.approx([0.7, 0.9])
    shown = {text.get_text() for text in second.get_legend().get_texts()}
    assert shown == {"published", "pyro-sbp", "before pruning", "baselines"}
    assert {"taylor", "lenet5", "BC-GHS"} <= {text.get_text() for text in second.texts}
    assert first.get_xlim()[1] > 30.6


def test_calibration_and_speed_stand_beside_macs():
    def measured(nll, ece):
        return {"nll": nll, "ece": ece}

    calibration = {"test": {"dense": measured(0.2, 1.5), "pruned": measured(0.25, 2.5)}}
    latency = {"device": "cpu: a machine", "threads": 1, "dense_ms": 8.0, "pruned_ms": 4.0}
    latency |= {"speedup": 2.0}
    latencies = [
        {**latency, "batch_size": 1, "runtime": "eager"},
        {**latency, "batch_size": 1, "runtime": "compile", "speedup": 3.0},
        {**latency, "batch_size": 128, "runtime": "eager"},
        {**latency, "batch_size": 128, "runtime": "eager", "threads": 2},
    ]
    found = [
        Record.of(made_up(0, 0.7, calibration=calibration, latencies=latencies)),
        Record.of(made_up(0, 0.7, "lenet5-small")),
    ]
    lines = network_tables.calibration(found, "lenet5").split("\n")
    assert lines[2:] == ["| SBP, `lenet5` | 0 | 10.00x | 0.200 | 0.250 | 1.50 | 2.50 |"]
    lines = network_tables.speed(found, "lenet5").split("\n")
    assert lines[2:] == [
        "| SBP, `lenet5`, seed 0 | 10.00x | 1 | 8.00 to 4.00 ms, 2.00x "
        "| 8.00 to 4.00 ms, 3.00x | - |",
        "| SBP, `lenet5`, seed 0 | 10.00x | 128 | 8.00 to 4.00 ms, 2.00x | - | - |",
    ]
    for table in (network_tables.calibration, network_tables.speed):
        with pytest.raises(RequestError, match="no record of lenet5 on mnist has"):
            table(found[1:], "lenet5")
