"""What loggers are given of a run, and that a resumed run continues its logs."""

import csv
import json

import pytest
from lightning_fabric.loggers import CSVLogger, Logger
from tiny_network import labelled_images

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.method_recipes import SBPRecipe
from pyro_sbp.recipes.request import Request
from pyro_sbp.training import loggers
from pyro_sbp.training.loggers import Log, WandbLogger, make_logger
from pyro_sbp.training.loop import Interrupted
from pyro_sbp.training.train import train

RECIPE = SBPRecipe(
    dense_epochs=1, epochs=2, finetune_epochs=1, batch_size=20, holdout=20,
    noise_learning_rate=0.3, init_log_scale=-1.0, kl_scale={"1": 2.0},
)  # fmt: skip
REQUEST = Request("tiny_network:Net", "digits", RECIPE)
EPOCHS = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def data():
    return labelled_images()


class Remembered(Logger):
    """A logger that keeps what it is given."""

    name, version = "remembered", 0

    def __init__(self):
        self.settings, self.metrics, self.status = [], [], []

    def log_hyperparams(self, params):
        self.settings.append(params)

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def finalize(self, status):
        self.status.append(status)


def stop_after(steps):
    """Asks to stop after some steps."""
    left = iter(range(steps - 1))
    return lambda: next(left, None) is None


def lines_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_logger_is_given_the_settings_every_epoch_and_the_summary(data, tmp_path):
    logger = Remembered()
    summary = train(REQUEST, data, tmp_path / "run", logger=logger)
    (settings,) = logger.settings
    assert settings["recipe/epochs"] == 2 and settings["seed"] == 0
    assert settings["recipe/kl_scale/1"] == 2.0
    *epochs, (last, final) = logger.metrics
    assert [step for step, _ in epochs] == EPOCHS and last == 4
    for (_, metrics), line in zip(epochs, lines_of(tmp_path / "run"), strict=True):
        assert metrics.pop("units/1") == line["units"]["1"]
        assert metrics == {k: v for k, v in line.items() if isinstance(v, float) or k == "macs"}
    assert final["final/error/pruned"] == summary.error.pruned
    assert final["final/calibration/test/dense/nll"] == summary.calibration["test"]["dense"].nll
    assert final["final/macs/ratio"] == summary.macs.ratio
    assert final["final/units/1"] == summary.units[0].kept
    assert all(isinstance(value, float) for value in final.values())
    assert logger.status == ["success"]


def test_several_loggers_are_told_how_a_run_ends(data, tmp_path):
    both = Remembered(), Remembered()
    with pytest.raises(Interrupted):
        train(REQUEST, data, tmp_path / "run", stop=stop_after(6), logger=both)
    train(REQUEST, data, tmp_path / "run", logger=both)
    for logger in both:
        assert [step for step, _ in logger.metrics] == [*EPOCHS, 4]
        assert len(logger.settings) == 1 and logger.status == ["interrupted", "success"]

    def broken():
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        train(REQUEST, data, tmp_path / "other", stop=broken, logger=(failed := Remembered()))
    assert failed.status == ["failed"]


def read_csv(directory, logged):
    with open(directory / "logs" / "csv" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    loss = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
    (final,) = (float(row["final/macs/ratio"]) for row in rows if row["final/macs/ratio"])
    return loss, final


def read_tensorboard(directory, logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "logs" / "tensorboard")).Reload()
    (final,) = found.Scalars("final/macs/ratio")
    return [(event.step, event.value) for event in found.Scalars("loss")], final.value


def read_wandb(directory, logged):
    # Every part of an interrupted run has files of its own, with the id of the one run, of which
    # `wandb sync` makes one run.
    logs = directory / "logs" / "wandb"
    files = (logs / "wandb").glob("offline-run-*/*.wandb")
    assert [path.stem for path in files] == 3 * [f"run-{(logs / 'run_id').read_text()}"]
    loss = [(step, metrics["loss"]) for step, metrics in logged if "loss" in metrics]
    (final,) = (metrics["final/macs/ratio"] for _, metrics in logged if "loss" not in metrics)
    return loss, final


def read_mlflow(directory, logged):
    from mlflow import MlflowClient

    (path,) = (directory / "logs" / "mlflow").glob("mlflow.db")
    client = MlflowClient(f"sqlite:///{path}")
    (run,) = client.search_runs([client.get_experiment_by_name("pyro-sbp").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["recipe/kl_scale/1"] == "2.0"
    history = client.get_metric_history(run.info.run_id, "loss")
    return [(metric.step, metric.value) for metric in history], run.data.metrics["final/macs/ratio"]


READ = {
    "csv": read_csv,
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
}


# MLflow's packages warn about themselves.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", READ)
def test_a_resumed_run_continues_its_log(name, data, tmp_path, monkeypatch):
    if name != "csv":
        pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run, logged = tmp_path / "run", []
    log = WandbLogger.log_metrics

    def log_and_keep(logger, metrics, step):  # because wandb has no public reader of its files
        logged.append((step, metrics))
        log(logger, metrics, step)

    monkeypatch.setattr(WandbLogger, "log_metrics", log_and_keep)
    for steps in (6, 5):  # in the second epoch, and again in the third
        with pytest.raises(Interrupted):
            train(REQUEST, data, run, stop=stop_after(steps), logger=make_logger(name, run))
    summary = train(REQUEST, data, run, logger=make_logger(name, run))
    loss, final = READ[name](run, logged)
    assert [step for step, _ in loss] == EPOCHS
    assert [value for _, value in loss] == pytest.approx([x["loss"] for x in lines_of(run)])
    assert final == pytest.approx(summary.macs.ratio)


def test_a_logger_of_fabric_without_hyperparameters_is_taken(data, tmp_path):
    train(REQUEST, data, tmp_path / "run", logger=CSVLogger(tmp_path / "elsewhere"))
    (path,) = (tmp_path / "elsewhere").rglob("metrics.csv")
    assert len(path.read_text().splitlines()) == 1 + len(EPOCHS) + 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_refused_with_its_extra(name, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    words = rf"the logger {name} needs more packages: pip install 'pyro-sbp\[{name}\]'"
    with pytest.raises(RequestError, match=words):
        make_logger(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


class Broken(Logger):
    """A logger whose server is away."""

    name, version = "broken", "0"

    def log_metrics(self, metrics, step=None):
        raise ConnectionError("the server is away")

    def log_hyperparams(self, params):
        raise ConnectionError("the server is away")

    def finalize(self, status):
        raise ConnectionError("the server is away")


def test_a_logger_that_fails_is_reported_once_and_does_not_stop_the_others(tmp_path):
    log = Log([Broken(), make_logger("csv", tmp_path)])
    line = {"loss": 1.0, "units": {"fc1": 3}}
    with pytest.warns(UserWarning, match="logger Broken failed.*the server is away") as warned:
        log.epoch(line, 1)
        log.epoch(line, 2)
        log.end("success")
    assert len(warned) == 1
    rows = (tmp_path / "logs" / "csv" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3


def test_the_rows_of_a_csv_file_survive_a_process_that_ends_while_it_is_written(
    tmp_path, monkeypatch
):
    logger = make_logger("csv", tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()

    def killed(logger):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CSVLogger, "save", killed)
        make_logger("csv", tmp_path)
    logger = make_logger("csv", tmp_path)
    logger.log_metrics({"loss": 0.5}, 2)
    logger.save()
    with open(tmp_path / "logs" / "csv" / "metrics.csv", newline="") as file:
        assert [(row["step"], row["loss"]) for row in csv.DictReader(file)] == [
            ("1", "1.0"),
            ("2", "0.5"),
        ]


def test_a_csv_file_that_was_cut_off_is_continued(tmp_path):
    log = Log(make_logger("csv", tmp_path))
    for step in (1, 2):
        log.epoch({"loss": 1.0, "units": {"fc1": 3}}, step)
    path = tmp_path / "logs" / "csv" / "metrics.csv"
    path.write_text(path.read_text() + "1.5,")
    Log(make_logger("csv", tmp_path)).epoch({"loss": 0.5, "units": {"fc1": 2}}, 3)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [path.name for path in path.parent.iterdir()] == ["metrics.csv"]
