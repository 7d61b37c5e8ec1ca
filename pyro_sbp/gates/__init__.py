"""Gates: the sets of units that noise can multiply and that pruning can remove.

Names are imported on first use, so that loading a pruned network does not import the modules that
find gates, nor SciPy, which they use.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from pyro_sbp.gates.attention import Attention, separate_attention
    from pyro_sbp.gates.calling import call, evaluating
    from pyro_sbp.gates.folding import factors, fold
    from pyro_sbp.gates.gate import Gate, Size, Span, check_theta
    from pyro_sbp.gates.gated_network import GatedNetwork
    from pyro_sbp.gates.layers import Select
    from pyro_sbp.gates.nested import convert, map_tensors, tensors_of
    from pyro_sbp.gates.probing import Gates, find_gates
    from pyro_sbp.gates.steady import repeatable
    from pyro_sbp.gates.surgery import (
        relative_difference,
        remaining_gates,
        shrink,
        surviving_units,
    )
    from pyro_sbp.gates.units import Units

__all__ = [
    "Attention",
    "Gate",
    "GatedNetwork",
    "Gates",
    "Select",
    "Size",
    "Span",
    "Units",
    "call",
    "check_theta",
    "convert",
    "evaluating",
    "factors",
    "find_gates",
    "fold",
    "map_tensors",
    "relative_difference",
    "remaining_gates",
    "repeatable",
    "separate_attention",
    "shrink",
    "surviving_units",
    "tensors_of",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attention": [
            "Attention",
            "separate_attention",
        ],
        "calling": [
            "call",
            "evaluating",
        ],
        "folding": [
            "factors",
            "fold",
        ],
        "gate": [
            "Gate",
            "Size",
            "Span",
            "check_theta",
        ],
        "gated_network": [
            "GatedNetwork",
        ],
        "layers": [
            "Select",
        ],
        "nested": [
            "convert",
            "map_tensors",
            "tensors_of",
        ],
        "probing": [
            "Gates",
            "find_gates",
        ],
        "steady": [
            "repeatable",
        ],
        "surgery": [
            "relative_difference",
            "remaining_gates",
            "shrink",
            "surviving_units",
        ],
        "units": [
            "Units",
        ],
    },
)
