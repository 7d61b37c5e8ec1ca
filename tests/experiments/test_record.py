"""Records of runs."""

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from pyro_sbp.architectures import DataConfig
from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments import record as record_module
from pyro_sbp.experiments.record import command, main, record
from pyro_sbp.experiments.rows import read_records, rows
from pyro_sbp.recipes.method_recipes import SBPRecipe
from pyro_sbp.recipes.named import RECIPES, default_recipe
from pyro_sbp.recipes.recipe import TEMPERATURE
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.train import train


def run_directory(path, seed, error, recipe=None, method="rbp", dataset="mnist", weights=None):
    """What a run leaves, made up."""
    recipe = recipe or default_recipe("lenet-500-300", "mnist", method)
    request = Request("lenet-500-300", dataset, recipe, seed=seed, weights=weights)
    path.mkdir()
    asked = {**request.to_dict(), "versions": {}, "machine": "a machine"}
    (path / "recipe.json").write_text(json.dumps(asked))
    named = {"arch": request.arch, "dataset": request.dataset, "method": method, "seed": seed}
    summary = {**named, "macs": {"ratio": 10.0 + seed}, "train_seconds": 120.0}
    (path / "summary.json").write_text(json.dumps(summary))
    phases = [("dense", 7, 3), ("gate a", 5, 6), ("gate a", error, 4), ("gate b", 4, 2)]
    lines = [
        {"phase": name, "error": value, "seconds": seconds, "units": {"a": 9 - index, "b": 8}}
        for index, (name, value, seconds) in enumerate(phases)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_record_tells_how_to_repeat_a_run_and_every_phase_at_its_end(tmp_path):
    found = record(run_directory(tmp_path / "run", 3, 4.5))
    assert found["command"] == (
        "pyro-sbp train --arch lenet-500-300 --dataset mnist --method rbp "
        "--recipe rbp-lenet-dense --seed 3"
    )
    assert found["recipe"] == "rbp-lenet-dense"
    assert [phase["phase"] for phase in found["phases"]] == ["dense", "gate a", "gate b"]
    assert found["phases"][1] == {
        "phase": "gate a", "epochs": 2, "error": 4.5, "units": {"a": 7, "b": 8},
        "seconds_per_epoch": 5,
    }  # fmt: skip
    other = RECIPES["rbp-lenet-dense-reversed"]
    found = record(run_directory(tmp_path / "other", 0, 4.5, other))
    assert "--method rbp --recipe rbp-lenet-dense-reversed --seed 0" in found["command"]
    found = record(run_directory(tmp_path / "sbp", 0, 4.5, method="sbp"))
    assert found["command"].endswith("--dataset mnist --recipe lenet-dense --seed 0")
    found = record(
        run_directory(tmp_path / "folder", 0, 4.5, other, dataset="folder:/there/images")
    )
    assert found["dataset"] == "folder:images" and "--dataset folder:images " in found["command"]
    with pytest.raises(ValueError, match="'rbp-lenet-dense-reversed' is not that of"):
        record(run_directory(tmp_path / "mine", 0, 4.5, replace(other, epochs=3)))


#: For every field of a request: another value, and what the command has for it.
FIELDS = {
    "arch": ("lenet-300-100", "--arch lenet-300-100"),
    "dataset": ("digits", "--dataset digits"),
    "recipe": (RECIPES["lenet-dense"], "--recipe lenet-dense"),
    "seed": (7, "--seed 7"),
    "device": ("cuda", "--device cuda"),
    "weights": ("runs/other/dense.pt", "--weights other/dense.pt"),
    "devices": (2, "--devices 2"),
    "precision": ("64-true", "--precision 64-true"),
    "channels_last": (True, "--channels-last"),
    "image_size": (16, "--image-size 16"),
    "teachers": (("runs/other",), "--teacher other"),
}
#: The directory of the data sets differs between machines, and --arch sets the statistics.
NOT_IN_COMMAND = {"data_dir", "standardize_by"}


def test_a_command_has_every_field_of_its_request():
    assert {field.name for field in fields(Request)} == FIELDS.keys() | NOT_IN_COMMAND
    recipe = RECIPES["digits"].replace(distill=4.0)
    request = Request("lenet5", "mnist", recipe)
    plain = command(request, changed=True)
    for name, (value, words) in FIELDS.items():
        assert f" {words} " not in f" {plain} "
        found = command(replace(request, **{name: value}), changed=True)
        assert f" {words} " in f" {found} "


def test_a_command_gives_images_the_size_and_the_statistics_of_the_run(monkeypatch):
    config = DataConfig(224, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    found = SimpleNamespace(data_config=lambda: config)
    monkeypatch.setattr(record_module, "find_architecture", {"timm:net": found}.get)
    given = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    request = Request("timm:net", "digits", RECIPES["digits"], image_size=224, standardize_by=given)
    words = "pyro-sbp train --arch timm:net --dataset digits --recipe digits"
    assert command(request) == f"{words} --seed 0"
    assert command(replace(request, image_size=96)) == f"{words} --image-size 96 --seed 0"
    # With this option, the recipe decides on the statistics.
    setting = f"--set standardize={str(RECIPES['digits'].standardize).lower()}"
    assert command(replace(request, standardize_by=None)) == f"{words} {setting} --seed 0"
    with pytest.raises(ValueError, match="no option sets the statistics of standardize_by"):
        command(replace(request, standardize_by={**given, "std": [1.0, 1.0, 1.0]}))
    with pytest.raises(ValueError, match="--arch timm:net resizes them to 224"):
        command(replace(request, image_size=None))


def test_a_command_names_the_run_in_whose_directory_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    recipe = RECIPES["digits"].replace(distill=4.0)
    request = Request("lenet5", "mnist", recipe, weights="dense.pt", teachers=(".", "../third"))
    found = command(request, changed=True)
    assert " --weights other/dense.pt --teacher other --teacher third " in found


def test_the_temperature_that_a_teacher_sets_is_not_a_change_of_the_recipe():
    # As `pyro-sbp train --recipe digits --teacher RUN` makes it.
    recipe = RECIPES["digits"].replace(distill=TEMPERATURE)
    request = Request("lenet5", "mnist", recipe, teachers=("runs/other",))
    assert command(request).endswith("--recipe digits --teacher other --seed 0")
    with pytest.raises(ValueError, match="'digits' is not that of"):
        command(replace(request, recipe=recipe.replace(distill=2.0)))


def test_a_run_of_an_earlier_version_is_recorded(tmp_path):
    run = run_directory(tmp_path / "run", 3, 4.5, method="sbp")
    expected = record(run)["command"]
    asked = json.loads((run / "recipe.json").read_text())
    asked["recipe"]["order"] = "forward"  # a setting of rbp, which every recipe had
    (run / "recipe.json").write_text(json.dumps(asked))
    assert record(run)["command"] == expected
    assert record_module.made_by(run / "dense.pt").recipe == RECIPES["lenet-dense"]


def test_only_a_run_that_lacks_a_file_is_not_finished(tmp_path, monkeypatch):
    run = run_directory(tmp_path / "run", 3, 4.5)

    def thresholds(run):
        raise OSError("the disk has failed")

    monkeypatch.setattr(record_module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record_module, "thresholds", thresholds)
    with pytest.raises(SystemExit, match=r"^the disk has failed$"):
        main([str(run), "--sweep"])
    (run / "metrics.jsonl").unlink()
    with pytest.raises(RequestError, match=r"run is not a finished run: .*metrics\.jsonl"):
        record(run)
    (run / "summary.json").write_text("{")
    with pytest.raises(RequestError, match=r"summary\.json is damaged: it is cut off"):
        record(run)


def test_a_record_names_the_run_whose_weights_it_started_from(tmp_path):
    dense = run_directory(tmp_path / "dense-run", 3, 4.5, method="sbp")
    recipe = default_recipe("lenet-500-300", "mnist", "rbp")
    run = run_directory(
        tmp_path / "run", 3, 4.5, recipe.replace(dense_epochs=0), weights=str(dense / "dense.pt")
    )
    found = record(run)
    assert found["command"] == (
        "pyro-sbp train --arch lenet-500-300 --dataset mnist --method rbp "
        "--recipe rbp-lenet-dense --weights dense-run/dense.pt --seed 3"
    )
    assert found["started_from"] == record(dense)["command"]
    found |= {"error": {"dense": 5.0, "finetuned": 4.5}, "units": []}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text(json.dumps(found))
    assert [one.recipe for one in read_records(tmp_path / "results")] == ["rbp-lenet-dense"]
    other = run_directory(
        tmp_path / "other", 0, 4.5, recipe.replace(dense_epochs=0), weights="elsewhere/w.pt"
    )
    with pytest.raises(SystemExit, match="which is not in a run directory"):
        main([str(other)])


def test_a_record_of_a_recipe_that_has_changed_is_refused(tmp_path):
    found = record(run_directory(tmp_path / "run", 0, 4.5))
    found |= {"error": {"dense": 5.0, "finetuned": 4.5}, "units": []}
    records = tmp_path / "results"
    records.mkdir()
    (records / "a.json").write_text(json.dumps(found))
    assert [one.recipe for one in read_records(records)] == ["rbp-lenet-dense"]
    found["settings"]["kl_scale"] = 1.5
    (records / "a.json").write_text(json.dumps(found))
    with pytest.raises(
        RequestError, match="made with other settings of the recipe 'rbp-lenet-dense'"
    ):
        read_records(records)


def test_a_record_takes_the_place_of_its_own_only(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_sbp.experiments.record.RESULTS", tmp_path / "results")
    run = run_directory(tmp_path / "run", 0, 4.5)
    main([str(run)])
    main([str(run)])
    (file,) = (tmp_path / "results").iterdir()
    before = file.read_text()
    asked = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**asked, "precision": "bf16-mixed"}))
    with pytest.raises(SystemExit, match="is the record of another command"):
        main([str(run)])
    assert file.read_text() == before
    (run / "recipe.json").write_text(json.dumps({**asked, "device": "cuda", "devices": 2}))
    assert " --device cuda --devices 2 --seed 0" in record(run)["command"]
    with pytest.raises(SystemExit, match=r"there is no directory .*none; expected the dir"):
        main([str(tmp_path / "none")])


def test_a_run_that_is_pruned_again_is_a_row_of_its_own(tmp_path, monkeypatch):
    recipe = SBPRecipe(
        name="short", dense_epochs=1, epochs=2, finetune_epochs=0, batch_size=64,
        noise_learning_rate=0.1,
    )  # fmt: skip
    monkeypatch.setitem(RECIPES, "short", recipe)
    monkeypatch.setattr("pyro_sbp.experiments.record.RESULTS", tmp_path / "results")
    request = Request("lenet-300-100", "digits", recipe, data_dir="nowhere")
    run = tmp_path / "run"
    train(request, load_dataset("digits", tmp_path, 28), run)
    main([str(run)])
    main([str(run), "--macs-ratio", "3", "--finetune-epochs", "1"])
    records = read_records(tmp_path / "results")
    plain, again = rows(records)
    assert (
        again.name == "SBP, `short`, pruned to 3x and fine-tuned for 1 epoch"
        and plain.name == "SBP, `short`"
    )
    assert 3 <= again.macs_ratio < 3.3 and again.dense == plain.dense
    assert again.first.content["error"]["finetuned"] is not None
    assert again.first.command.endswith(" && pyro-sbp prune RUN --macs-ratio 3 --finetune-epochs 1")
    with pytest.raises(SystemExit, match="macs_ratio"):
        main([str(run), "--macs-ratio", "1e6"])
