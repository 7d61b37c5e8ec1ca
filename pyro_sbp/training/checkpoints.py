"""Checkpoints: all that a run needs to resume, read without running any code of the file."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_sbp.errors import RequestError, first_line
from pyro_sbp.recipes.request import Request
from pyro_sbp.training import old_formats
from pyro_sbp.training.files import write_whole

__all__ = ["FORMAT", "Checkpoint", "Place"]

#: The format that is written.
FORMAT = 2


@dataclass
class Place:
    """Where a phase stands.

    Attributes:
        order: the state of the generator of the order of the data, at the start of the epoch.
        total: the sums of NLL and weighted KL over the examples of the epoch, of all processes.
        epoch: the epochs that have ended.
        step: the steps of the epoch that have ended.
        seen: the examples of these steps.
        seconds: the time spent on the epoch.
    """

    order: Tensor
    total: Tensor
    epoch: int = 0
    step: int = 0
    seen: int = 0
    seconds: float = 0.0

    def next_epoch(self, order: Tensor) -> None:
        """Begin the next epoch."""
        self.order, self.total = order, torch.zeros(2)
        self.epoch, self.step, self.seen, self.seconds = self.epoch + 1, 0, 0, 0.0


@dataclass
class Checkpoint:
    """All that a run needs to resume, and its posterior.

    Attributes:
        request: what the run was asked to do.
        finished: the records of the phases that have ended, from `Phase.record`.
        current: the state of the module of the phase under way, and where in it the network is.
        optimizer, schedule: the states of the optimizer and of the learning rates.
        place: where the phase stands.
        errors: in percent, by split and by the network's name.
        seconds: the time of the epochs that have ended.
        lines: the lines of `metrics.jsonl`.
        order: the state of the generator of the order of the data.
        random: for every process, the states of the generators by device.
        left_alone: the layers that are not prunable, and why.
        posteriors: from the name of a site to location and scale of its posterior, over all
            elements: of log theta of a gate's units, or of a layer's weights.
    """

    request: Request
    finished: list[dict[str, Any]]
    current: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    place: Place
    errors: dict[str, dict[str, float | None]]
    seconds: float
    lines: list[dict[str, Any]]
    order: Tensor
    random: list[dict[str, Tensor]]
    left_alone: dict[str, str] | None
    posteriors: dict[str, tuple[Tensor, Tensor]]

    def write(self, path: Path) -> None:
        """Write the file, which appears whole or not at all.

        Raises:
            OSError: it cannot be written; what was at `path` is left as it was.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["request"] = json.dumps(self.request.to_dict())
        values["place"] = dataclasses.asdict(self.place)
        # Serialise in memory first, so that a full disk raises OSError instead of a torch error.
        content = io.BytesIO()
        torch.save({"format": FORMAT, **values}, content)
        write_whole(path, content.getbuffer())

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a `checkpoint.pt`, with tensors on the CPU.

        Raises:
            RequestError: it is damaged, or not the checkpoint of a run.
        """
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
        except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise RequestError(f"{path} is damaged: {first_line(error)}") from error
        try:
            if "format" not in saved:
                saved = old_formats.checkpoint(saved)
            elif saved["format"] != FORMAT:
                raise RequestError(
                    f"{path} has format {saved['format']!r}; this version of pyro-sbp reads "
                    f"format {FORMAT} and older ones"
                )
            values = {field.name: saved[field.name] for field in dataclasses.fields(cls)}
            values["request"] = Request.from_dict(json.loads(values["request"]))
            values["place"] = Place(**values["place"])
            return cls(**values)
        except RequestError as error:
            raise RequestError(f"{path} cannot be read: {error}") from error
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise RequestError(f"{path} is damaged: it is not the checkpoint of a run") from error

    def network(self) -> dict[str, Tensor]:
        """The network's tensors in the last phase with noise, by name; none before such a phase."""
        for record in reversed([*self.finished, self.current]):
            if prefix := record.get("network"):
                state = record["module"]
                names = [name for name in state if name.startswith(prefix)]
                return {name.removeprefix(prefix): state[name] for name in names}
        return {}
