"""The criteria compared on a finished run."""

import json
from pathlib import Path

import pytest

from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments import criteria
from pyro_sbp.recipes.criteria import CRITERIA
from pyro_sbp.recipes.method_recipes import SBPRecipe
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.files import write_json
from pyro_sbp.training.train import train

RECIPE = SBPRecipe(
    dense_epochs=1, epochs=3, finetune_epochs=1, batch_size=64, noise_learning_rate=0.1,
    init_log_scale=-1.0,
)  # fmt: skip
REQUEST = Request("lenet-300-100", "digits", RECIPE, data_dir="nowhere")


def test_every_criterion_prunes_and_fine_tunes_the_same_run(tmp_path, monkeypatch):
    data = load_dataset("digits", tmp_path, 28)
    run = tmp_path / "run"
    summary = train(REQUEST, data, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    rows = criteria.compared(REQUEST, data, run, finetune_epochs=2)
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}
    assert [row["criterion"] for row in rows] == list(CRITERIA)
    own = rows[0]
    assert (own["threshold"], own["macs"]) == (1.0, summary.macs.pruned)
    assert own["units"] == {unit.gate: unit.kept for unit in summary.units}
    assert own["error"]["pruned"] == pytest.approx(summary.error.pruned, abs=0.3)
    assert all(0 <= row["error"]["finetuned"] <= 100 for row in rows)
    assert len({str(row["units"]) for row in rows}) > 1

    entry = {"arch": REQUEST.arch, "dataset": "digits", "method": "sbp", "recipe": "digits"}
    entry |= {"seed": 0, "command": "pyro-sbp train", "versions": {"torch": "2"}, "machine": "m"}
    entry["finetune_epochs"] = 2
    (tmp_path / "records").mkdir()
    write_json(tmp_path / "records" / "one.json", {**entry, "criteria": rows})
    monkeypatch.setattr(criteria, "DIRECTORY", tmp_path / "records")
    lines = criteria.table().splitlines()
    first = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert first[0] == "LeNet-300-100 on digits, SBP, `digits`, seed 0"
    assert first[3] == "-".join(str(unit.kept) for unit in summary.units)
    assert lines[-1] == "- `pyro-sbp train`; fine-tuned for 2 epochs; torch 2; m"
    assert len(lines) == 2 + len(rows) + 2


def test_a_record_is_replaced_by_one_of_as_much_fine_tuning(tmp_path, monkeypatch, capsys):
    entry = {"arch": REQUEST.arch, "dataset": "digits", "method": "sbp", "recipe": "digits"}
    entry |= {"seed": 0, "command": "pyro-sbp train"}
    monkeypatch.setattr(criteria, "DIRECTORY", tmp_path / "records")
    monkeypatch.setattr(criteria, "read_request", {Path("run"): REQUEST}.get)
    monkeypatch.setattr(criteria, "record", {Path("run"): entry}.get)
    monkeypatch.setattr(criteria, "load_data", lambda *_: None)
    monkeypatch.setattr(criteria, "compared", lambda *_: [])

    def refusal(*arguments):
        with pytest.raises(SystemExit):
            criteria.main(["run", *arguments])
        return capsys.readouterr().err.splitlines()[-1]

    criteria.main(["run"])  # the one epoch of the recipe
    criteria.main(["run", "--finetune-epochs", "3"])
    criteria.main(["run", "--finetune-epochs", "3"])
    (path,) = (tmp_path / "records").iterdir()
    before = path.read_text()
    assert json.loads(before)["finetune_epochs"] == 3
    words = "has 3 epochs of fine-tuning, more than 0; delete it to replace it"
    assert refusal("--finetune-epochs", "0").endswith(words)
    entry["command"] = "pyro-sbp train --device cuda"
    words = "is the record of another command; delete it to replace it"
    assert refusal("--finetune-epochs", "3").endswith(words)
    assert path.read_text() == before

    def broken(*_):
        raise OSError("the disk has failed")

    path.unlink()
    monkeypatch.setattr(criteria, "load_data", broken)
    assert refusal().endswith("error: the disk has failed")


def test_a_table_without_records_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(criteria, "DIRECTORY", tmp_path)
    with pytest.raises(RequestError, match="there is no record in"):
        criteria.table()
