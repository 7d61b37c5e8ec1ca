"""pyro-sbp: make neural networks smaller by Bayesian inference.

Names are imported on first use, so that ``import pyro_sbp`` costs nothing and loading a pruned
network needs torch only.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_sbp import distributions, networks
    from pyro_sbp.attention import separate_attention
    from pyro_sbp.benchmarking import benchmark
    from pyro_sbp.elbo import ClosedFormELBO
    from pyro_sbp.gates import Gate, GatedNetwork, fold
    from pyro_sbp.guides import TruncatedLogNormalGuide
    from pyro_sbp.models import GatedModel
    from pyro_sbp.probing import find_gates
    from pyro_sbp.pruning import prune
    from pyro_sbp.recalibration import recalibrate_batch_norm
    from pyro_sbp.saving import load, save
    from pyro_sbp.sparse_guide import AdditiveNormalGuide
    from pyro_sbp.sparse_model import SparseModel
    from pyro_sbp.sparsity import prune_weights
    from pyro_sbp.surgery import shrink

__all__ = [
    "AdditiveNormalGuide",
    "ClosedFormELBO",
    "Gate",
    "GatedModel",
    "GatedNetwork",
    "SparseModel",
    "TruncatedLogNormalGuide",
    "benchmark",
    "distributions",
    "find_gates",
    "fold",
    "load",
    "networks",
    "prune",
    "prune_weights",
    "recalibrate_batch_norm",
    "save",
    "separate_attention",
    "shrink",
]

_MODULE_OF = {
    "AdditiveNormalGuide": "sparse_guide",
    "ClosedFormELBO": "elbo",
    "Gate": "gates",
    "GatedModel": "models",
    "GatedNetwork": "gates",
    "SparseModel": "sparse_model",
    "TruncatedLogNormalGuide": "guides",
    "benchmark": "benchmarking",
    "find_gates": "probing",
    "fold": "gates",
    "load": "saving",
    "prune": "pruning",
    "prune_weights": "sparsity",
    "recalibrate_batch_norm": "recalibration",
    "save": "saving",
    "separate_attention": "attention",
    "shrink": "surgery",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("pyro-sbp")
    if name in _MODULE_OF:
        value = getattr(import_module(f"pyro_sbp.{_MODULE_OF[name]}"), name)
    elif name in __all__:
        value = import_module(f"pyro_sbp.{name}")
    else:
        raise AttributeError(f"module 'pyro_sbp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
