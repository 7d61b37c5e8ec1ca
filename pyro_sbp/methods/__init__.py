"""The pruning methods. Each defines the phases of training, and makes the smaller network."""

from pyro_sbp.methods.gated import GatedMethod
from pyro_sbp.methods.method import Method
from pyro_sbp.methods.phase import Phase
from pyro_sbp.methods.rbp import RBP
from pyro_sbp.methods.sbp import SBP
from pyro_sbp.methods.sparse_vd import SparseVD

__all__ = ["RBP", "SBP", "GatedMethod", "Method", "Phase", "SparseVD"]
