"""A run's checkpoint as values: tensors, numbers and strings, read without running any code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from pyro_sbp.errors import RequestError, first_line
from pyro_sbp.recipes.request import Request

__all__ = ["read_checkpoint"]

#: What a checkpoint consists of.
CONTENT = {
    *("request", "finished", "module", "optimizer", "schedule", "place"),
    *("errors", "seconds", "lines", "order", "random"),
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a `checkpoint.pt`, on the CPU; its request as a `Request`.

    Raises:
        RequestError: it is damaged, or no checkpoint of a run.
    """
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise RequestError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(saved, dict) or not saved.keys() >= CONTENT:
        raise RequestError(f"{path} is damaged: it is no checkpoint of a run")
    try:
        return {**saved, "request": Request.from_dict(json.loads(saved["request"]))}
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{path} is damaged: {first_line(error)}") from error
