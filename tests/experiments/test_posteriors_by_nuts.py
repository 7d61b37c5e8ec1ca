"""The table of the guide beside NUTS has a row for every coefficient."""

import pytest
import torch

from pyro_sbp.experiments.posteriors_by_nuts import TRUTH, rows


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_rows():
    found = list(rows(0, steps=2, samples=3, warmup=2, size=20))
    assert [row.truth for row in found] == list(TRUTH)
    for row in found:
        for mean, deviation in (row.guide, row.nuts):
            assert 0 < mean <= 1 and deviation >= 0
    assert torch.get_default_dtype() == torch.float32
