"""Published MACs ratios are those of the published units."""

from itertools import pairwise

import pytest

from pyro_sbp.reports.published import PUBLISHED


def dense(sizes):
    return sum(a * b for a, b in pairwise(sizes))


def lenet5(conv1, conv2, flat, fc1):
    """Convolutions of 5 x 5 on 28 x 28 pixels without padding, a pooling after each."""
    return 25 * (conv1 * 24**2 + conv1 * conv2 * 8**2) + dense((flat, fc1, 10))


MACS = {
    "lenet-500-300": lambda *units: dense((*units, 10)),
    "lenet-300-100": lambda *units: dense((*units, 10)),
    "lenet5": lenet5,
}
WHOLE = {
    "lenet-500-300": (784, 500, 300),
    "lenet-300-100": (784, 300, 100),
    "lenet5": (20, 50, 800, 500),
}
COUNTED = [paper for paper in PUBLISHED if paper.arch in MACS and paper.units]


@pytest.mark.parametrize("paper", COUNTED, ids=lambda paper: f"{paper.method} {paper.units}")
def test_the_ratio_is_that_of_the_units(paper):
    macs = MACS[paper.arch]
    units = tuple(map(int, paper.units.split("-")))
    assert macs(*WHOLE[paper.arch]) / macs(*units) == pytest.approx(paper.macs_ratio, rel=0.01)


@pytest.mark.parametrize("paper", PUBLISHED, ids=lambda paper: f"{paper.method} {paper.units}")
def test_a_number_not_read_in_its_paper_says_so(paper):
    words = paper.source.partition(": ")[2]
    if words:
        assert words.startswith("number "), paper.source
    else:
        assert paper.source.endswith(("arXiv 1705.07283", "cifar_resnet.ipynb"))
