"""Loggers of a run: the loggers that ``--logger`` can name, and the values that are logged.

Lightning Fabric has loggers for CSV files and TensorBoard. The loggers for Weights & Biases and
MLflow are here. All of them are optional, and their packages are imported when they are used.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from csv import DictReader
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_fabric.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_fabric.loggers.logger import rank_zero_experiment

from pyro_sbp.errors import RequestError, first_line
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.summary import Summary

__all__ = ["Log", "MLflowLogger", "WandbLogger", "check_logger", "make_logger"]

#: The project in Weights & Biases and the experiment in MLflow.
PROJECT = "pyro-sbp"
#: The values of a line of `metrics.jsonl` that are logged, besides the units of every gate.
OF_AN_EPOCH = ("loss", "nll", "kl", "weighted_kl", "error", "macs", "seconds")
#: The values of a summary that are logged, besides the units of every gate.
OF_A_SUMMARY = (
    "error",
    "validation_error",
    "training_error",
    "calibration",
    "macs",
    "parameters",
    "weights",
    "files",
    "equivalence",
    "train_seconds",
)


class Log:
    """Passes the values of a run to its loggers. Only the first process calls the methods.

    The step is the number of finished epochs over all phases.

    Args:
        loggers: one or several loggers of Lightning Fabric.
    """

    def __init__(self, loggers: Logger | Sequence[Logger] = ()) -> None:
        self.loggers = [loggers] if isinstance(loggers, Logger) else list(loggers)
        self._failed: list[Logger] = []

    def settings(self, request: Request) -> None:
        """Log the settings of a run as hyperparameters."""
        settings = dict(_flat(request.to_dict()))
        for logger in self.loggers:
            # Fabric's CSVLogger cannot store hyperparameters; they are in recipe.json.
            if not isinstance(logger, CSVLogger):
                self._try(logger, partial(logger.log_hyperparams, settings))

    def epoch(self, line: Mapping[str, Any], step: int) -> None:
        """Log an epoch.

        Args:
            line: the line of `metrics.jsonl`.
            step: the number of epochs up to and including this one.
        """
        metrics = {name: line[name] for name in OF_AN_EPOCH if name in line}
        self._metrics({**metrics, "units": line["units"]}, step)

    def result(self, summary: Summary, step: int) -> None:
        """Log the numbers of the summary, with the prefix ``final/``."""
        values = summary.to_dict()
        final = {name: values[name] for name in OF_A_SUMMARY if name in values}
        units = {unit.gate: unit.kept for unit in summary.units}
        self._metrics({"final": {**final, "units": units}}, step)

    def _metrics(self, values: Mapping[str, Any], step: int) -> None:
        found = {k: float(v) for k, v in _flat(values) if isinstance(v, int | float)}
        for logger in self.loggers:

            def log(logger: Logger = logger) -> None:
                logger.log_metrics(found, step)
                logger.save()

            self._try(logger, log)

    def end(self, status: str) -> None:
        """Close the loggers.

        Args:
            status: "success", "interrupted" or "failed".
        """
        for logger in self.loggers:
            self._try(logger, partial(logger.finalize, status))

    def _try(self, logger: Logger, action: Callable[[], Any]) -> None:
        """Call a logger. If it fails, training continues, with one warning per logger."""
        try:
            action()
        except Exception as error:  # a server may be unreachable, or a disk full
            if logger not in self._failed:
                self._failed.append(logger)
                warnings.warn(
                    f"the logger {type(logger).__name__} failed, and its log is not complete: "
                    f"{first_line(error)}",
                    stacklevel=2,
                )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, with the keys of each path joined by "/"."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def check_logger(name: str) -> None:
    """Check that the package of a logger is installed.

    Args:
        name: "csv", "tensorboard", "wandb" or "mlflow".

    Raises:
        RequestError: the package is not installed.
    """
    if name != "csv" and find_spec(name) is None:
        raise RequestError(f"the logger {name} needs more packages: pip install 'pyro-sbp[{name}]'")


def make_logger(name: str, run: Path) -> Logger:
    """A logger that writes into a run directory. A resumed run continues the same log.

    Args:
        name: "csv", "tensorboard", "wandb" or "mlflow".
        run: the run directory. The logger writes to ``logs/NAME`` in it. If ``MLFLOW_TRACKING_URI``
            is set, MLflow sends its metrics to that server.

    Raises:
        RequestError: the package of the logger is not installed.
    """
    check_logger(name)
    logs = run / "logs"
    match name:
        case "csv":
            return _csv_logger(logs)
        case "tensorboard":
            return TensorBoardLogger(logs, name, version="")
        case "wandb":
            return WandbLogger(logs / name, run.resolve().name)
        case "mlflow":
            return MLflowLogger(logs / name, run.resolve().name)
    raise ValueError(f"unknown logger {name!r}")


def _csv_logger(logs: Path) -> CSVLogger:
    """A logger that starts with the rows of an existing file."""
    path, before, rows = logs / "csv" / "metrics.csv", logs / "metrics.csv.before", []
    if path.is_file() and not before.is_file():
        path.replace(before)  # Fabric's logger cannot continue a file
    if before.is_file():  # also if the process ended before its rows were written again
        path.unlink(missing_ok=True)
        with open(before, newline="", encoding="utf-8") as file:
            rows = [row for row in map(_row, DictReader(file)) if row is not None]
    logger = CSVLogger(logs, "csv", version="")
    for step, metrics in rows:
        logger.log_metrics(dict(metrics), step)
    if rows:
        logger.save()
    before.unlink(missing_ok=True)
    return logger


def _row(row: Mapping[str, Any]) -> tuple[int, dict[str, float]] | None:
    """The step and the metrics of a row of a file; None for an incomplete row."""
    try:
        return int(row["step"]), {name: float(x) for name, x in row.items() if x and name != "step"}
    except (KeyError, TypeError, ValueError):
        return None


class _RemoteLogger(Logger):
    """A logger of a service that has an id for every run.

    Args:
        directory: the directory for the files of the logger, and for the id that a resumed run
            needs to continue its log.
        name: the name of the run.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self._name = directory, name
        self._experiment: Any = None

    @property
    def name(self) -> str:
        """The name of the run."""
        return self._name

    @property
    def version(self) -> str | None:
        """The id of the run; None before the run has begun."""
        path = self.directory / "run_id"
        return path.read_text("utf-8") if path.is_file() else None

    def _keep(self, run_id: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "run_id").write_text(run_id, "utf-8")


class WandbLogger(_RemoteLogger):
    """Logs to Weights & Biases, or with ``WANDB_MODE=offline`` only to files for ``wandb sync``."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `wandb.Run`."""
        if self._experiment is None:
            import wandb

            if self.version is None:
                self._keep(secrets.token_hex(4))
            self._experiment = wandb.init(
                project=PROJECT,
                name=self.name,
                id=self.version,
                resume="allow",
                dir=self.directory,
                settings=wandb.Settings(console="off"),  # do not record progress bars
            )
        return self._experiment

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.log(metrics, step=step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.experiment.config.update(params, allow_val_change=True)

    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status == "failed"))
            self._experiment = None


class MLflowLogger(_RemoteLogger):
    """Logs to the MLflow server in ``MLFLOW_TRACKING_URI``, or to a local database by default."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `mlflow.MlflowClient`, after the run was begun or resumed."""
        if self._experiment is None:
            from mlflow import MlflowClient

            logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs its database set-up
            self.directory.mkdir(parents=True, exist_ok=True)
            local = self.directory.resolve()
            uri = os.environ.get("MLFLOW_TRACKING_URI")
            client = MlflowClient(uri or f"sqlite:///{local / 'mlflow.db'}")
            if self.version is None:
                found = client.get_experiment_by_name(PROJECT)
                artifacts = None if uri else (local / "artifacts").as_uri()
                number = (
                    client.create_experiment(PROJECT, artifacts)
                    if found is None
                    else found.experiment_id
                )
                self._keep(client.create_run(number, run_name=self.name).info.run_id)
            else:
                client.update_run(self.version, status="RUNNING")
            self._experiment = client
        return self._experiment

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        client = self.experiment
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        found = [Metric(name, value, now, step or 0) for name, value in metrics.items()]
        client.log_batch(self.version, metrics=found)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        client = self.experiment
        for name, value in params.items():
            client.log_param(self.version, name, value)

    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            ends = {"success": "FINISHED", "interrupted": "KILLED"}
            self._experiment.set_terminated(self.version, ends.get(status, "FAILED"))
            self._experiment = None
