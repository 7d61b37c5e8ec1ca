"""The methods: each gives the training loop a list of phases and makes a smaller network."""

from pyro_sbp.methods.phase import Method, Phase
from pyro_sbp.methods.rbp import RBP
from pyro_sbp.methods.sbp import SBP
from pyro_sbp.methods.sparse_vd import SparseVD

__all__ = ["RBP", "SBP", "Method", "Phase", "SparseVD"]
