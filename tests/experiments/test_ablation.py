"""The ablation of the recipe of LeNet-500-300."""

import tomllib

import pytest

from pyro_sbp.errors import RequestError
from pyro_sbp.experiments import ablation
from pyro_sbp.recipes.named import RECIPES
from pyro_sbp.training.files import write_json


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "DIRECTORY", tmp_path)

    def write(change, seed, *errors, macs_ratio=31.0):
        error = dict(zip(("dense", "pruned", "finetuned"), errors, strict=True))
        entry = {"change": change, "seed": seed, "error": error, "macs_ratio": macs_ratio}
        write_json(tmp_path / f"{change}-{seed}.json", entry)

    return write


def test_a_change_is_compared_with_the_runs_of_the_same_seeds(records):
    records("base", 0, 1.8, 2.4, 2.0)
    records("base", 1, 2.0, 2.6, 3.0)
    records("dense", 1, 1.5, 2.2, 2.5, macs_ratio=32.0)
    lines = [line.strip("| ").split(" | ") for line in ablation.table().splitlines()]
    assert lines[2][1:4] == ["1.90", "2.50", "2.50"] and lines[2][-1] == "2"
    assert lines[3][1:] == ["1.50", "2.20", "2.50", "-0.50", "32.0x", "1"]


def test_missing_records_are_refused(records):
    with pytest.raises(RequestError, match="there is no record in"):
        ablation.table()
    records("dense", 2, 1.5, 2.2, 2.5)
    with pytest.raises(RequestError, match=r"has no record base-2\.json"):
        ablation.table()
    write_json(ablation.DIRECTORY / "labels-0.json", {"change": "labels", "seed": 0})
    with pytest.raises(RequestError, match="is not a record of the ablation: lacks 'error'"):
        ablation.table()


def test_a_record_has_the_machine_of_its_run(tmp_path):
    (tmp_path / "base-0").mkdir()
    summary = {"macs": {"ratio": 31.5}, "validation_error": {"dense": 1.8}, "train_seconds": 60.0}
    write_json(tmp_path / "base-0" / "summary.json", summary)
    asked = {"versions": {"torch": "1.0"}, "machine": "another machine"}
    write_json(tmp_path / "base-0" / "recipe.json", asked)
    found = ablation.measured("base", 0, tmp_path, tmp_path)
    assert {name: found[name] for name in asked} == asked


@pytest.mark.parametrize("name", ablation.CHANGES)
def test_every_change_is_a_valid_recipe(name):
    change = ablation.CHANGES[name]
    settings = {
        key: value for text in change.settings for key, value in tomllib.loads(text).items()
    }
    recipe = RECIPES["lenet-dense-smallest"].replace(cut_every=5)
    changed = recipe.replace(**settings)
    assert (changed != recipe) is bool(settings)
    recipe.rule(change.criterion)
