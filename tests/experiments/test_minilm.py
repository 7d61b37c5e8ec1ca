"""The example of a pretrained transformer, on a tiny BERT and a few sentences."""

import json
import sys
from unittest.mock import MagicMock

import pytest
import torch

from pyro_sbp.errors import RequestError
from pyro_sbp.experiments import minilm_run, minilm_tables


def network(error, macs, heads, units, **more):
    return {
        "error": error, "macs": macs, "encoder_parameters": macs // 32, "pruned": {"error": 40.0},
        "heads": heads, "units": units, **more,
    }  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with the records of two seeds."""
    directory = tmp_path / "experiments" / "results" / "minilm"
    directory.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for seed, error in ((0, 11.0), (1, 12.0)):
        entry = {
            "seed": seed, "command": f"python --seed {seed}", "versions": {"torch": "2"},
            "machine": "a processor",
            "networks": {
                "dense": {"error": 10.0, "macs": 320_000_000, "encoder_parameters": 10_000_000},
                "sbp-2": network(error, 160_000_000, [[0, 3], [5]], [800, 20]),
                "magnitude-2": network(error + 2, 150_000_000, [[0], [1]], [700, 700]),
            },
        }  # fmt: skip
        (directory / f"seed-{seed}.json").write_text(json.dumps(entry))
    monkeypatch.setattr(minilm_tables, "DIRECTORY", directory)
    monkeypatch.setattr(minilm_tables.read, "__defaults__", (directory,))
    return tmp_path


def test_the_table_has_medians_over_the_seeds(root):
    lines = minilm_tables.results().split("\n")
    assert lines[2] == "| dense | 320 M | 1.00x | 10.0 M | | 90.0 (90.0 to 90.0) | | 2 |"
    assert lines[3] == ("| SBP | 160 M | 2.00x | 5.0 M | 60.0 | 88.5 (88.0 to 89.0) | -1.5 | 2 |")
    assert "- `python --seed 1`" in lines


def test_the_tables_of_units_and_speed(root):
    assert minilm_tables.units().split("\n")[2] == "| SBP, 2.00x | 2-1 | 800-20 |"
    with pytest.raises(RequestError, match=r"speed\.json"):
        minilm_tables.speed()
    latency = {"runtime": "eager", "batch_size": 1, "dense_ms": 6.0, "pruned_ms": 3.0}
    entry = {
        "networks": {
            "sbp-2": {"macs_ratio": 2.0, "onnx_difference": 1e-6, "latencies": [latency]}
        },
        "command": "python", "versions": {"torch": "2"}, "machine": "a processor",
    }  # fmt: skip
    directory = root / "experiments" / "results" / "minilm"
    (directory / "speed.json").write_text(json.dumps(entry))
    table = minilm_tables.speed().split("\n")
    assert table[0] == "| network | fewer MACs | PyTorch, batch 1 | difference of ONNX |"
    assert table[2] == "| SBP | 2.00x | 2.00x (3.0 ms) | 1e-06 |"


def test_the_figure_is_drawn_when_its_numbers_have_changed(root):
    pytest.importorskip("matplotlib")
    files = list(minilm_tables.FILES)
    assert minilm_tables.out_of_date(root) == files
    minilm_tables.draw(root, files)
    assert minilm_tables.out_of_date(root) == []
    path = root / "experiments" / "results" / "minilm" / "seed-0.json"
    path.write_text(path.read_text().replace("[5]", "[5, 6]"))
    assert minilm_tables.out_of_date(root) == files


def test_a_checkout_without_records_has_no_figure(tmp_path):
    assert minilm_tables.out_of_date(tmp_path) == []
    with pytest.raises(RequestError, match="there is no record"):
        minilm_tables.read(tmp_path)


def test_a_run_resumes_only_with_its_own_sentences(tmp_path, monkeypatch):
    for name in ("transformers", "transformers.utils"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.setattr(minilm_run, "load_sentences", lambda *_, **__: (None, None))

    def start(model="model", data="data", **changed):
        settings = minilm_run.Settings(**changed.pop("settings", {}))
        try:
            minilm_run.Run(tmp_path / "run", tmp_path / model, tmp_path / data, settings, **changed)
        except RequestError as error:
            return str(error).partition(" has ")[2]
        return ""

    assert start() == start() == start(settings={"budgets": (3.0,)}) == ""
    path = tmp_path / "run" / "settings.json"
    words = "other settings ({}); give another run directory"
    for name, value in (("holdout", 1_000), ("model", "other"), ("data", "other")):
        before = path.read_text()
        assert start(**{name: value}) == words.format(name)
        assert path.read_text() == before
    assert start(validate=True, settings={"seed": 1}) == words.format("seed, validate")
    # A run of an earlier version, which did not write these settings, still resumes.
    old = json.loads(path.read_text())
    for name in ("holdout", "model", "data"):
        del old[name]
    path.write_text(json.dumps(old))
    assert start() == "" and json.loads(path.read_text()) == old
    assert start(settings={"seed": 1}) == words.format("seed")


@pytest.fixture
def tiny(tmp_path):
    """A tiny BERT with a tokenizer, and 240 sentences whose first word decides."""
    transformers = pytest.importorskip("transformers")
    words = [f"word{index}" for index in range(35)]
    model, data = tmp_path / "model", tmp_path / "sst"
    model.mkdir(), data.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (model / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(model)
    transformers.BertTokenizerFast(str(model / "vocab.txt")).save_pretrained(model)
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 240), ("dev", 60)):
        lines = ["label\tsentence"]
        for _ in range(count):
            length = int(torch.randint(3, 12, (), generator=generator))
            ids = torch.randint(0, 35, (length,), generator=generator).tolist()
            lines.append(f"{int(ids[0] > 16)}\t{' '.join(words[i] for i in ids)}")
        (data / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return model, data


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_every_stage_on_a_tiny_network(tiny, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    from pyro_sbp.experiments import minilm, minilm_speed

    model, data = tiny
    results = tmp_path / "results"
    monkeypatch.setattr(minilm, "RESULTS", results)
    monkeypatch.setattr(minilm_speed, "RESULTS", results)
    run = tmp_path / "run"
    options = [
        str(run), "--model", str(model), "--data", str(data), "--holdout", "40",
        "--sentences", "200", "--budgets", "1.5", "--learning-rate", "1e-3", "--noise-epochs", "2",
    ]  # fmt: skip
    threads = torch.get_num_threads()
    for stage in ("train", "magnitude", "record"):
        minilm.main([stage, *options, "--threads", str(threads)])
    entry = json.loads((results / "seed-0.json").read_text())
    assert list(entry["networks"]) == ["dense", "sbp-1.5", "magnitude-1.5"]
    assert entry["settings"]["holdout"] == 40 and str(tmp_path) not in json.dumps(entry)
    dense, small = entry["networks"]["dense"], entry["networks"]["sbp-1.5"]
    assert dense["macs"] >= 1.5 * small["macs"] and len(small["heads"]) == 2

    minilm_speed.main(["--model", str(model), "--batch-size", "1", "--threads", str(threads)])
    networks = json.loads((results / "speed.json").read_text())["networks"]
    assert list(networks) == ["sbp-1.5", "magnitude-1.5"]
    # The pooler keeps all of its units.
    assert 0 <= networks["sbp-1.5"]["macs"] - small["macs"] <= 32 * (32 + 2)
    assert networks["sbp-1.5"]["onnx_difference"] < 1e-4
    assert [each["runtime"] for each in networks["sbp-1.5"]["latencies"]] == [
        "eager",
        "onnxruntime",
    ]

    # What is there is not made again, and a run with other settings is refused.
    before = (run / "noisy.pt").stat().st_mtime_ns
    minilm.main(["train", *options])
    assert (run / "noisy.pt").stat().st_mtime_ns == before
    with pytest.raises(RequestError, match="has other settings"):
        minilm.main(["train", *options, "--distill", "3"])
