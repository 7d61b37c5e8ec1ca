"""pyro-sbp: make neural networks smaller by Bayesian inference.

Names are imported on first use. So ``import pyro_sbp`` is fast, and loading a pruned network
imports only torch and safetensors.
"""

from typing import TYPE_CHECKING, Any

import lazy_loader

if TYPE_CHECKING:
    from pyro_sbp import distributions, networks
    from pyro_sbp.deployment.benchmarking import benchmark
    from pyro_sbp.deployment.exporting import export
    from pyro_sbp.deployment.loading import load
    from pyro_sbp.deployment.saving import save
    from pyro_sbp.deployment.speedup import Speedup
    from pyro_sbp.deployment.unit_latency import measure_unit_latency
    from pyro_sbp.gates.attention import separate_attention
    from pyro_sbp.gates.folding import fold
    from pyro_sbp.gates.gate import Gate
    from pyro_sbp.gates.gated_network import GatedNetwork
    from pyro_sbp.gates.probing import find_gates
    from pyro_sbp.gates.surgery import relative_difference, shrink
    from pyro_sbp.models.draws import posterior_draws
    from pyro_sbp.models.elbo import ClosedFormELBO
    from pyro_sbp.models.ensemble import Ensemble
    from pyro_sbp.models.gated_guide import TruncatedLogNormalGuide
    from pyro_sbp.models.gated_model import GatedModel
    from pyro_sbp.models.sparse_guide import AdditiveNormalGuide
    from pyro_sbp.models.sparse_model import SparseModel
    from pyro_sbp.models.truncated_normal_guide import TruncatedNormalGuide
    from pyro_sbp.pruning.budgets import MaxErrorIncrease
    from pyro_sbp.pruning.costs import UnitCosts
    from pyro_sbp.pruning.macs import count_macs
    from pyro_sbp.pruning.pruner import Pruner
    from pyro_sbp.pruning.pruning import prune
    from pyro_sbp.pruning.recalibration import recalibrate_batch_norm
    from pyro_sbp.pruning.sparsity import prune_weights
    from pyro_sbp.training.fine_tuning import fine_tune

__all__ = [
    "AdditiveNormalGuide",
    "ClosedFormELBO",
    "Ensemble",
    "Gate",
    "GatedModel",
    "GatedNetwork",
    "MaxErrorIncrease",
    "Pruner",
    "SparseModel",
    "Speedup",
    "TruncatedLogNormalGuide",
    "TruncatedNormalGuide",
    "UnitCosts",
    "benchmark",
    "count_macs",
    "distributions",
    "export",
    "find_gates",
    "fine_tune",
    "fold",
    "load",
    "measure_unit_latency",
    "networks",
    "posterior_draws",
    "prune",
    "prune_weights",
    "recalibrate_batch_norm",
    "relative_difference",
    "save",
    "separate_attention",
    "shrink",
]

_find, _names, _ = lazy_loader.attach(
    __name__,
    submodules=["distributions", "networks"],
    submod_attrs={
        "deployment.benchmarking": ["benchmark"],
        "deployment.exporting": ["export"],
        "deployment.loading": ["load"],
        "deployment.saving": ["save"],
        "deployment.speedup": ["Speedup"],
        "deployment.unit_latency": ["measure_unit_latency"],
        "gates.attention": ["separate_attention"],
        "gates.folding": ["fold"],
        "gates.gate": ["Gate"],
        "gates.gated_network": ["GatedNetwork"],
        "gates.probing": ["find_gates"],
        "gates.surgery": ["relative_difference", "shrink"],
        "models.draws": ["posterior_draws"],
        "models.elbo": ["ClosedFormELBO"],
        "models.ensemble": ["Ensemble"],
        "models.gated_guide": ["TruncatedLogNormalGuide"],
        "models.gated_model": ["GatedModel"],
        "models.sparse_guide": ["AdditiveNormalGuide"],
        "models.sparse_model": ["SparseModel"],
        "models.truncated_normal_guide": ["TruncatedNormalGuide"],
        "pruning.budgets": ["MaxErrorIncrease"],
        "pruning.costs": ["UnitCosts"],
        "pruning.macs": ["count_macs"],
        "pruning.pruner": ["Pruner"],
        "pruning.pruning": ["prune"],
        "pruning.recalibration": ["recalibrate_batch_norm"],
        "pruning.sparsity": ["prune_weights"],
        "training.fine_tuning": ["fine_tune"],
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("pyro-sbp")
    return _find(name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_names()])
