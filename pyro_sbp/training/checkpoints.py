"""Checkpoints: everything a run needs to resume. Reading one runs no code from the file."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from torch import Tensor
from typing_extensions import TypedDict

from pyro_sbp.errors import RequestError, damage
from pyro_sbp.recipes.request import Request
from pyro_sbp.training import old_formats
from pyro_sbp.training.files import write_whole
from pyro_sbp.training.runs import Line

__all__ = ["FORMAT", "Checkpoint", "Place", "write_tensors"]

#: The format that is written.
FORMAT = 2


@dataclass
class Place:
    """The position of training within a phase.

    Attributes:
        order: the state of the generator for the order of the data, at the start of the epoch.
        total: the sums of NLL and weighted KL over the examples of the epoch and all processes.
        epoch: the number of finished epochs.
        step: the number of finished steps in the current epoch.
        seen: the number of examples in these steps.
        seconds: the time spent on the current epoch.
    """

    order: Tensor
    total: Tensor
    epoch: int = 0
    step: int = 0
    seen: int = 0
    seconds: float = 0.0

    def next_epoch(self, order: Tensor) -> None:
        """Begin the next epoch."""
        self.order, self.total = order, torch.zeros(2, device="cpu")
        self.epoch, self.step, self.seen, self.seconds = self.epoch + 1, 0, 0, 0.0


@dataclass
class Checkpoint:
    """Everything a run needs to resume, and its posterior.

    Attributes:
        request: the request of the run.
        finished: the records of the finished phases, from `Phase.record`.
        current: the state of the module of the current phase, and the prefix of the network in it.
        optimizer, schedule: the states of the optimizer and of the learning rates.
        place: the position of training within the current phase.
        errors: in percent, by split and by the name of the network.
        seconds: the time of the finished epochs.
        lines: the lines of `metrics.jsonl`.
        order: the state of the generator for the order of the data.
        random: for every process, the states of the random generators by device.
        left_alone: the layers that are not prunable, and why.
        posteriors: from the name of a site to location and scale of its posterior, for all
            elements: of log theta of the units of a gate, or of the weights of a layer.
        average: the state of the moving average of the weights, if there is one.
        gates: from the name of a gate to its size, in the order of the network; None in
            checkpoints of earlier versions.
        calibration: NLL and ECE, by split and by the name of the network; None in checkpoints of
            earlier versions.
        method: the state of the method, from `PhasedTraining.state`, if it has any.
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
    average: dict[str, Any] | None = None
    gates: dict[str, int] | None = None
    calibration: dict[str, dict[str, dict[str, float]]] | None = None
    method: dict[str, Any] | None = None

    def write(self, path: Path) -> None:
        """Write the file atomically, with a checksum of its values.

        Raises:
            OSError: the file cannot be written; an existing file at `path` is not changed.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["request"] = json.dumps(self.request.to_dict())
        values["place"] = dataclasses.asdict(self.place)
        write_tensors(path, {"format": FORMAT, "checksum": _checksum(values), **values})

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a `checkpoint.pt`, with tensors on the CPU.

        Raises:
            RequestError: the file is damaged, differs from its checksum, is not the checkpoint of a
                run, or has the format of a later version. Checkpoints of earlier versions have no
                checksum.
        """
        try:
            # Open the file once, because a run that has not ended may replace it.
            with open(path, "rb") as file:
                # torch.load does not verify the checksums of all records.
                with zipfile.ZipFile(file) as archive:
                    if (record := archive.testzip()) is not None:
                        raise ValueError(f"{record!r} differs from its checksum")
                file.seek(0)
                saved = torch.load(file, weights_only=True, map_location="cpu")
            # The zip checksums do not show whether values were changed before the file was packed.
            expected = saved.pop("checksum", None) if isinstance(saved, dict) else None
            if expected is not None:
                values = {name: value for name, value in saved.items() if name != "format"}
                if _checksum(values) != expected:
                    raise ValueError("its values differ from their checksum")
        except Exception as error:  # damaged bytes may raise anything
            raise RequestError(f"{path} is damaged: {damage(error)}") from error
        found = saved.get("format") if isinstance(saved, dict) else None
        if isinstance(found, int) and found != FORMAT:
            raise RequestError(
                f"{path} cannot be read: it has format {found}; this version of pyro-sbp reads "
                f"format {FORMAT} and older ones"
            )
        try:
            if "format" not in saved:
                saved = old_formats.checkpoint(saved)
            _SAVED.validate_python(saved)
            values = {field.name: saved.get(field.name) for field in dataclasses.fields(cls)}
            values["request"] = Request.from_dict(json.loads(values["request"]))
            values["place"] = Place(**values["place"])
            return cls(**values)
        except ValidationError as error:
            raise RequestError(f"{path} is damaged: {_finding(error)}") from error
        except RequestError as error:
            raise RequestError(f"{path} cannot be read: {error}") from error
        except Exception as error:  # values of wrong types may raise anything
            raise RequestError(f"{path} is damaged: it is not the checkpoint of a run") from error

    def network(self) -> dict[str, Tensor]:
        """The tensors of the network in the last phase with noise, by name; empty if no such phase
        has begun."""
        for record in reversed([*self.finished, self.current]):
            if prefix := record.get("network"):
                state = record["module"]
                names = [name for name in state if name.startswith(prefix)]
                return {name.removeprefix(prefix): state[name] for name in names}
        return {}


def write_tensors(path: Path, values: Any) -> None:
    """Write a file with `torch.save`, atomically.

    Raises:
        OSError: the file cannot be written; an existing file at `path` is not changed.
    """
    # Serialise in memory first, so that a full disk raises OSError instead of a torch error.
    content = io.BytesIO()
    torch.save(values, content)
    write_whole(path, content.getbuffer())


_CONFIG = ConfigDict(strict=True, arbitrary_types_allowed=True)
_Count = Annotated[int, Field(ge=0)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@with_config(_CONFIG)
class _Place(TypedDict):
    """The fields of `Place`."""

    order: Tensor
    total: Tensor
    epoch: NotRequired[_Count]
    step: NotRequired[_Count]
    seen: NotRequired[_Count]
    seconds: NotRequired[_Seconds]


@with_config(_CONFIG)
class _Record(TypedDict):
    """The values that `Phase.record` returns. The state of a module may have values that are not
    tensors."""

    module: NotRequired[dict[str, Any]]
    network: NotRequired[str | None]
    guide: NotRequired[dict[str, Tensor]]
    equivalence: NotRequired[dict[str, float]]
    units: NotRequired[dict[str, tuple[Tensor, Tensor]]]


@with_config(_CONFIG)
class _Control(TypedDict):
    """The values of `KLControl.state_dict`."""

    integral: float
    position: float
    log_ratio: float
    speed: float
    start: list[float] | None
    macs_weight: float
    factor: float
    ratio: float
    reference: float | None
    weights: dict[str, float]


@with_config(_CONFIG)
class _Saved(TypedDict):
    """The values in the file, named like the attributes of `Checkpoint`."""

    request: str
    finished: list[_Record]
    current: _Record
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    place: _Place
    errors: dict[str, dict[str, float | None]]
    seconds: _Seconds
    lines: list[Line]
    order: Tensor
    random: Annotated[list[dict[str, Tensor]], Field(min_length=1)]
    left_alone: dict[str, str] | None
    posteriors: dict[str, tuple[Tensor, Tensor]]
    average: NotRequired[dict[str, Any] | None]
    gates: NotRequired[dict[str, _Count] | None]
    calibration: NotRequired[dict[str, dict[str, dict[str, float]]] | None]
    method: NotRequired[_Control | None]


_SAVED = TypeAdapter(_Saved)


def _checksum(values: Mapping[str, Any]) -> str:
    """The SHA-256 of nested plain values and tensors, in hexadecimal."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{list(value.shape)}".encode())
            numbers = value.detach().cpu().contiguous()
            # A tensor of one number may have a stride that does not allow a view of its bytes.
            numbers = numbers.as_strided((numbers.numel(),), (1,))
            found.update(numbers.view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                found.update(f"{key!r}:".encode())
                add(item)
        elif isinstance(value, list | tuple):
            found.update(f"{len(value)} items".encode())
            for item in value:
                add(item)
        else:
            found.update(f"{value!r};".encode())

    add(values)
    return found.hexdigest()


def _finding(error: ValidationError) -> str:
    """The first error of a validation in one line, without the value, which may be a tensor."""
    found = error.errors(include_url=False, include_input=False)[0]
    name = " ".join(" ".join(str(part) for part in found["loc"]).split())
    if found["type"] == "missing":
        return f"{name} is missing"
    message = found["msg"].replace("Input should be", "expected")
    return f"{name}: {message}" if name else "it is not the checkpoint of a run"
