"""The survey of networks of several libraries, on small networks."""

import json
import multiprocessing

import pytest
import torch
from torch import nn

from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.survey import __main__ as command
from pyro_sbp.experiments.survey import records, tables
from pyro_sbp.experiments.survey.collections import COLLECTIONS, Surveyed, collection
from pyro_sbp.experiments.survey.measurement import Prepared, block_names, measure
from pyro_sbp.experiments.survey.other_version import find, version_of
from pyro_sbp.experiments.survey.processes import Comparisons, measured
from pyro_sbp.experiments.survey.torch_pruning_cut import compare


class Classifier(nn.Module):
    """Two blocks with 3 heads of 4 dimensions and 30 hidden units, between two dense layers."""

    def __init__(self):
        super().__init__()
        block = nn.TransformerEncoderLayer(12, 3, 30, batch_first=True)
        self.stem, self.head = nn.Linear(5, 12), nn.Linear(12, 2)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.stem(x))[:, 0])


@pytest.fixture(scope="module")
def row():
    torch.manual_seed(0)
    surveyed = Surveyed("encoder", Classifier(), torch.randn(2, 7, 5))
    prepared = Prepared(surveyed)
    return {**measure(surveyed, prepared), "torch_pruning": compare(prepared)}


def test_a_third_of_heads_and_hidden_units_leaves_two_thirds_of_the_blocks(row):
    assert row["gates"] == 4 and row["units"] == 66 and row["attention"] == [2, 2]
    # 7 tokens of 2 examples: 4 layers of 12 x 12, 2 of 12 x 30, and 2 products of 7 x 7 x 12.
    macs = 2 * 7 * (4 * 144 + 2 * 360 + 2 * 7 * 12)
    left = {f"encoder.layers.{i}": [macs, macs * 2 // 3] for i in range(2)}
    assert row["blocks"] == left
    outside = 2 * (7 * 5 * 12 + 12 * 2)
    assert row["macs"] == 2 * macs + outside
    assert row["macs_left"] == (4 * macs / 3 + outside) / row["macs"]
    assert row["macs_by_unit_costs"] == pytest.approx(row["macs_left"])


def test_a_network_that_casts_to_float32_is_measured():
    class Casts(Classifier):
        def forward(self, x):
            return super().forward(x.float())

    torch.manual_seed(0)
    surveyed = Surveyed("encoder", Casts(), torch.randn(2, 7, 5))
    found = measure(surveyed, Prepared(surveyed))
    assert found["gates"] == 4 and found["max_rel_diff"] <= 1e-10


def test_both_libraries_cut_the_same_network_exactly(row):
    assert row["max_rel_diff"] <= 1e-10 and row["torch_pruning"]["max_rel_diff"] <= 1e-10
    assert row["torch_pruning"]["macs_left"] == row["macs_left"]
    assert row["not_prunable"]["is an output"][0] == 1


def test_blocks_are_found_by_their_attention_or_named():
    net = Classifier()
    assert block_names(net, None) == ["encoder.layers.0", "encoder.layers.1"]
    assert block_names(net, "stem|head") == ["stem", "head"]


def test_a_network_with_a_record_is_not_measured_again(row, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(
        command, "measured", lambda _, name, *others: asked.append((name, *others)) or row
    )
    words = ["torchvision", "alexnet", "vgg11", "--output-dir", str(tmp_path)]
    command.main(words[:2] + words[3:])
    command.main(words)
    assert asked == [(name, 150.0, Comparisons()) for name in ("alexnet", "vgg11")]
    command.main([*words[:2], *words[3:], "--again", "--limit", "3"])
    assert asked[2:] == [("alexnet", 3.0, Comparisons())]
    assert "2 of 2 attention layers" in capsys.readouterr().out
    record = records.read("torchvision", tmp_path)
    assert record["networks"] == json.loads(json.dumps({"alexnet": row, "vgg11": row}))
    assert record["versions"]["torch"] == torch.__version__
    assert record["command"] == "python -m pyro_sbp.experiments.survey torchvision"
    with pytest.raises(SystemExit, match="2"):
        command.main(["torchvision", "alexnot", "--output-dir", str(tmp_path)])
    assert "has no network 'alexnot'; did you mean 'alexnet'" in capsys.readouterr().err


def test_comparisons_are_added_to_a_record(row, monkeypatch, tmp_path, capsys):
    alone = {key: value for key, value in row.items() if key != "torch_pruning"}
    before = {"gates": 4, "units": 66, "cpu_seconds": 1.0}
    asked = []

    def measured(collected, name, limit, comparisons):
        asked.append(comparisons)
        results = {"before": before, "torch_pruning": row["torch_pruning"]}
        return {**alone, **{key: results[key] for key in comparisons.keys}}

    monkeypatch.setattr(command, "measured", measured)
    monkeypatch.setattr(command, "check_installed", lambda name: None)
    monkeypatch.setattr(command, "version_of", lambda directory: f"commit of {directory}")
    words = ["torchvision", "alexnet", "--output-dir", str(tmp_path)]
    command.main(words)
    command.main([*words, "--before", "a"])
    assert asked == [Comparisons(), Comparisons(before="a")]
    assert records.read("torchvision", tmp_path)["before"] == "commit of a"
    with pytest.raises(SystemExit, match="2"):
        command.main([*words, "--before", "b"])
    assert "the record compares with version commit of a" in capsys.readouterr().err
    # A network that fails now keeps its earlier results.
    monkeypatch.setattr(
        command, "measured", lambda *words: asked.append(words[3]) or {"failed": "x"}
    )
    command.main([*words, "--before", "a", "--against", "torch-pruning"])
    assert asked[2:] == [Comparisons(torch_pruning=True)]
    kept = records.read("torchvision", tmp_path)["networks"]["alexnet"]
    assert kept == json.loads(json.dumps({**alone, "before": before}))
    assert "alexnet: x; its earlier record stays" in capsys.readouterr().out


def test_another_version_finds_the_gates_in_a_process_of_its_own(tmp_path):
    # Another version of the package, which needs no other modules.
    package = tmp_path / "pyro_sbp"
    package.mkdir()
    (package / "__init__.py").write_text(
        "class Gate:\n    size = 7\n\n"
        "def find_gates(net, x, ignore):\n    return [Gate()] if not ignore else 1 / 0\n"
    )
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        for ignore, expected in (((), {"gates": 1, "units": 7}), (("a",), {"failed": "Zero"})):
            surveyed = Surveyed("linear", nn.Linear(2, 2), torch.ones(1, 2), ignore=ignore)
            found = pool.apply(find, (surveyed, str(tmp_path)))
            assert all(str(found[key]).startswith(str(value)) for key, value in expected.items())
    with pytest.raises(RequestError, match="is not a git checkout"):
        version_of(str(tmp_path))
    with pytest.raises(RequestError, match="there is no package pyro_sbp"):
        version_of(str(package))


def test_a_library_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        command.main(["segmentation-models-pytorch"])
    words = "this needs segmentation-models-pytorch: pip install segmentation-models-pytorch\n"
    assert capsys.readouterr().err.endswith(words)


def test_the_tables_of_a_record(row, tmp_path):
    record = records.new("torchvision", ["torchvision"])
    inexact = {**row, "gates": 6, "torch_pruning": {"max_rel_diff": 0.5}}
    other = {**row, "family": "other", "torch_pruning": {"failed": "it cannot"}}
    row = dict(row)
    rows = {"a": row, "b": inexact, "c": other, "d": {"failed": "not finished after 3 s"}}
    row["before"] = {"gates": 3, "units": 60, "cpu_seconds": 3 * row["cpu_seconds"]}
    inexact["before"] = {"failed": "not finished after 9 s"}
    record["before"] = "1234567"
    for name, found in rows.items():
        records.add(record, name, found, tmp_path)
    seconds = tables.seconds("torchvision", directory=tmp_path).splitlines()[2]
    assert seconds.startswith("| torchvision | 1234567 | 2 | 1 | ")
    assert seconds.endswith(" | 3.00 |")
    slowest = tables.slowest("torchvision", directory=tmp_path).splitlines()
    assert slowest[2].startswith("| torchvision a | ") and slowest[2].endswith(" | 3 | 4 |")
    assert "not finished after 9 s" in slowest[3] and slowest[3].endswith(" | | 6 |")
    families = tables.families("torchvision", directory=tmp_path).splitlines()
    assert families[2].startswith("| encoder | 2 | 4 to 6 |") and "other" in families[3]
    assert families[4] == "| d | 1 | | | | | not finished after 3 s |"
    assert "| torchvision | 4 of 80 | 1 |" in tables.summary(directory=tmp_path)
    assert "| torchvision | 3 | 3 | 1 | 1 | 1 |" in tables.against(directory=tmp_path)
    assert "| a | 2 | 2 of 2 | 67% |" in tables.blocks("torchvision", directory=tmp_path)
    by_block = tables.by_block("torchvision", "c", directory=tmp_path)
    assert f"| c | encoder.layers.1 | {row['blocks']['encoder.layers.1'][0]:,} | 67% |" in by_block
    with pytest.raises(RequestError, match="no family 'vit'"):
        tables.families("torchvision", "vit", directory=tmp_path)
    with pytest.raises(RequestError, match="there is no record"):
        tables.families("timm", directory=tmp_path)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_every_collection_has_networks(name):
    names = collection(name).names()
    assert len(names) == len(set(names)) > 10


@pytest.mark.slow
def test_a_network_that_takes_too_long_is_ended():
    assert measured("torchvision", "densenet121", 0.0) == {"failed": "not finished after 0 s"}
