"""Data sets: labelled images for training and testing, in memory or read from disk.

Names are imported on first use: the module that locates data sets (`sources`) needs no torch.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from pyro_sbp.datasets.loading import ImageData, load_dataset
    from pyro_sbp.datasets.splits import Split

__all__ = ["ImageData", "Split", "load_dataset"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__, submod_attrs={"loading": ["ImageData", "load_dataset"], "splits": ["Split"]}
)
