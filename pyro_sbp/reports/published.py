"""Published results to compare with: test errors and MACs ratios."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED", "Published", "published"]


@dataclass(frozen=True)
class Published:
    """A published result.

    Most papers report the best test error of all epochs, not that of the last epoch.

    Attributes:
        arch, dataset: as in a request.
        method: the name of the method in the source.
        error: the test error in percent.
        macs_ratio: MACs of the dense network divided by those of the pruned network, from the
            published units, or as published where there are none.
        units: the units that are kept, layer by layer; empty if the source does not report them.
        source: the paper of the method. The number is from the same paper, unless the text after it
            names another source or says that it was not compared with the paper.
    """

    arch: str
    dataset: str
    method: str
    error: float
    macs_ratio: float
    units: str
    source: str


_SBP = "Neklyudov et al. 2017, arXiv 1705.07283"
_LATER = "number from later comparisons"
_UNCHECKED = "number not compared with the paper"
_AGAIN = f"Neklyudov et al. 2017, run again by others: {_LATER}"
_RECALLED = f"{_SBP}: {_UNCHECKED}"
_TANG = "Tang et al. 2018, arXiv 1811.03060"
_BC = f"Louizos et al. 2017, arXiv 1705.08665: number in {_TANG}"
_L0 = f"Louizos et al. 2018, arXiv 1712.01312: number in {_TANG}"
_FLOPS = f"{_TANG}: {_UNCHECKED}"
_BB = f"Lee et al. 2018, arXiv 1805.10896: {_LATER}"
_FIGURE = "Lee et al. 2018, arXiv 1805.10896: number read from a figure; units depend on the image"
_HREL = (
    "Sarvani et al. 2022, arXiv 2202.10716: number is the published increase of 0.52 points, "
    "added to the dense error in Neklyudov et al. 2017"
)
_EVCI = "Evci et al. 2020, arXiv 1911.11134"
_VIB_LENET = f"Dai et al. 2018, arXiv 1802.10399: number in {_EVCI}"
_VIB = f"Dai et al. 2018, arXiv 1802.10399: {_LATER}"
_MODEL_OPTIMIZER = "NVIDIA Model Optimizer, examples/pruning/cifar_resnet.ipynb"
_LENET5 = ("lenet5", "mnist")
_LENET500 = ("lenet-500-300", "mnist")
_LENET300 = ("lenet-300-100", "mnist")
_VGG = ("vgg-like", "cifar10")
_RESNET20 = ("resnet20", "cifar10")
_VGG_START = "64-62-128-126-234-155-31-"

PUBLISHED = (
    Published(*_LENET500, "dense", 1.54, 1.0, "784-500-300", _SBP),
    Published(*_LENET500, "SparseVD", 1.57, 3.73, "537-217-130", _SBP),
    Published(*_LENET500, "SSL", 1.49, 6.06, "434-174-78", _SBP),
    Published(*_LENET500, "SBP", 1.55, 11.23, "245-160-55", _SBP),
    Published(*_LENET500, "SBP, run again", 1.57, 14.9, "285-107-53", _AGAIN),
    Published(*_LENET500, "SBP, run again", 1.59, 18.0, "255-100-43", _AGAIN),
    Published(*_LENET500, "BB dropout", 1.60, 30.6, "227-66-37", _BB),
    Published(*_LENET500, "DBB dropout", 1.33, 24.0, "", _FIGURE),
    Published(*_LENET500, "DBB dropout", 1.55, 44.0, "", _FIGURE),
    Published(*_LENET300, "VIBNet", 1.6, 27.9, "97-71-33", _VIB_LENET),
    Published(*_LENET5, "dense", 0.80, 1.0, "20-50-800-500", _SBP),
    Published(*_LENET5, "SparseVD", 0.75, 2.01, "17-32-329-75", _SBP),
    Published(*_LENET5, "SSL", 1.00, 4.53, "3-12-800-500", _SBP),
    Published(*_LENET5, "SBP", 0.86, 10.78, "3-18-284-283", _SBP),
    Published(*_LENET5, "BC-GHS", 1.0, 15.0, "5-10-76-16", _BC),
    Published(*_LENET5, "BC-GNJ", 1.0, 8.1, "8-13-88-13", _BC),
    Published(*_LENET5, "L0-sep", 1.0, 5.9, "9-18-65-25", _L0),
    Published(*_LENET5, "FLOPs objective", 1.0, 15.2, "3-8-128-499", _FLOPS),
    Published(*_LENET5, "FLOPs objective", 1.1, 20.9, "2-7-112-478", _FLOPS),
    Published(*_LENET5, "HRel", 1.32, 34.0, "2-3-48-500", _HREL),
    Published(*_VGG, "dense", 7.2, 1.0, "", _RECALLED),
    Published(*_VGG, "SparseVD", 7.2, 2.27, f"{_VGG_START}81-76-9-138-101-413-373", _RECALLED),
    Published(*_VGG, "SBP", 7.5, 2.30, f"{_VGG_START}79-73-9-59-73-56-27", _RECALLED),
    Published(*_VGG, "SBPa", 9.0, 3.16, "44-54-92-115-234-155-31-76-55-9-34-35-21-280", _RECALLED),
    Published(*_VGG, "SBP, run again", 7.27, 2.01, "", _AGAIN),
    Published(*_VGG, "BB dropout", 6.66, 2.16, "", _BB),
    Published(*_VGG, "VIBNet", 7.17, 2.65, "", _VIB),
    Published(*_RESNET20, "dense", 9.03, 1.0, "", _MODEL_OPTIMIZER),
    Published(*_RESNET20, "FastNAS", 9.72, 1.37, "", _MODEL_OPTIMIZER),
)


def published(arch: str, dataset: str) -> list[Published]:
    """The published results for a network on a data set."""
    return [paper for paper in PUBLISHED if (paper.arch, paper.dataset) == (arch, dataset)]
