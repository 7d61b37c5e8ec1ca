"""Convert the files of runs of earlier versions to the current format.

A checkpoint of the first format has no ``format``. The posterior is inside the states of the
phases' modules, under the names of the guide's parameters, and a recipe has the settings of all
methods.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_sbp.methods.stage import over_all_units
from pyro_sbp.models.gated_guide import LOC_MARGIN, LOG_SCALE_RANGE
from pyro_sbp.models.gated_model import LOG_HIGH, LOG_LOW, widest
from pyro_sbp.models.weight_noise import unflat, within_range
from pyro_sbp.training import old_recipes

__all__ = ["checkpoint"]

#: The name of the location of log theta: the prefix of the guide, and the gate.
_LOC = re.compile(r"(?P<guide>(?:.*\.)?)locs\.(?P<gate>.+)_unconstrained")
#: The names of two values of a turn of RBP: the differences between the pruned and the masked
#: network, and the units of a gate that remained.
_TURN = re.compile(r"(?:1\.)?(?P<what>exactness|there)(?:\.(?P<gate>.+))?")
_LOG_VARIANCES = "log_variances."
_State = Mapping[str, Tensor]


def checkpoint(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the values of a checkpoint of the first format.

    Raises:
        KeyError, TypeError, ValueError: the values are not those of such a checkpoint.
    """
    request = old_recipes.request(json.loads(saved["request"]))
    posteriors: dict[str, tuple[Tensor, Tensor]] = {}
    for state in [*saved["finished"], saved["module"]]:
        posteriors.update(_posteriors(state, request["recipe"].get("prior_scale")))
    return {
        **{key: saved[key] for key in ("optimizer", "schedule", "place", "seconds", "lines")},
        **{key: saved[key] for key in ("order", "random")},
        "request": json.dumps(request),
        "finished": [_record(state) for state in saved["finished"]],
        "current": _record(saved["module"]),
        "errors": {
            "test": saved["errors"],
            "validation": saved.get("validation_errors") or {},
            "training": saved.get("training_errors") or {},
        },
        "left_alone": saved.get("left_alone"),
        "posteriors": posteriors,
    }


def _guide_prefix(state: _State) -> str | None:
    """The prefix of the names of the parameters of the guide; None if there is no guide."""
    return next((m["guide"] for name in state if (m := _LOC.fullmatch(name))), None)


def _record(state: _State) -> dict[str, Any]:
    """The record of a phase, as `Phase.record` returns it."""
    if not state:  # the next phase continues to train the same module
        return {}
    guide = _guide_prefix(state)
    if guide is None:
        sparse = any(name.startswith(_LOG_VARIANCES) for name in state)
        return {"module": dict(state), "network": "net." if sparse else ""}
    parameters = {n.removeprefix(guide): v for n, v in state.items() if n.startswith(guide)}
    parameters = {n: v for n, v in parameters.items() if n.startswith(("locs.", "log_scales."))}
    net = {n.removeprefix("0."): v for n, v in state.items() if n.startswith("0.")}
    if not net:  # a turn of RBP that is not the last
        rel, absolute = state["exactness"].tolist()
        exact = {"max_rel_diff_float64": rel, "max_abs_diff": absolute}
        return {"guide": parameters, "equivalence": exact}
    module = {f"net.{n}": v for n, v in net.items()}
    return {
        "module": {**module, **{f"guide.{n}": v for n, v in parameters.items()}},
        "network": "net.",
    }


def _posteriors(
    state: _State, prior_scale: float | None
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Location and scale of every site of a phase, for all of its elements in the dense network."""
    for name, log_variance in state.items():
        if name.startswith(_LOG_VARIANCES):
            layer = unflat(name.removeprefix(_LOG_VARIANCES))
            mean = state[f"net.{layer}.weight"]
            # The last step may have moved it out of the range to which the model clamps it.
            yield layer, (mean, (0.5 * within_range(log_variance.clone(), mean)).exp())
    there = {
        match["gate"]: value
        for name, value in state.items()
        if (match := _TURN.fullmatch(name)) and match["what"] == "there" and match["gate"]
    }
    for name, loc in state.items():
        match = _LOC.fullmatch(name)
        if match is None:
            continue
        log_scale = state[f"{match['guide']}log_scales.{match['gate']}_unconstrained"]
        # The last step may have moved them out of the ranges to which the guide clamps them.
        loc = loc.clamp(LOG_LOW - LOC_MARGIN, LOG_HIGH + LOC_MARGIN)
        scale = log_scale.clamp(LOG_SCALE_RANGE[0], widest(prior_scale)).exp()
        units = there.get(
            match["gate"].replace(".", "/"), torch.ones(len(loc), dtype=torch.bool, device="cpu")
        )
        yield match["gate"], over_all_units(loc, scale, units, prior_scale)
