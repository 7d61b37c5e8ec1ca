"""Calibration against its definition, and against values computed by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from pyro_sbp.models.calibration import BINS, Measured, measured, sums


def logits_of(*probabilities):
    """Logits over two classes whose first one has the given probabilities."""
    return torch.tensor([[math.log(p), math.log(1 - p)] for p in probabilities]).double()


def expected(logits, labels):
    """NLL and ECE by a loop over the bins of Guo et al., equations 1 to 3."""
    log_p = log_softmax(logits, axis=1)
    confidence = np.exp(log_p.max(1))
    right = log_p.argmax(1) == labels
    ece = 0.0
    for b in range(1, BINS + 1):
        inside = ((b - 1) / BINS < confidence) & (confidence <= b / BINS)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return -log_p[np.arange(len(labels)), labels].mean(), 100 * ece


def test_two_bins_by_hand():
    # Confidences 0.9, 0.9, 0.9 of which two are right, and 0.6 which is wrong.
    logits, labels = logits_of(0.9, 0.9, 0.9, 0.6), torch.tensor([0, 0, 1, 1])
    found = measured(sums(logits, labels), 4)
    assert found.error == 50.0
    nll = -(2 * math.log(0.9) + math.log(0.1) + math.log(0.4)) / 4
    assert found.nll == pytest.approx(nll, abs=1e-6)
    ece = 3 / 4 * (0.9 - 2 / 3) + 1 / 4 * 0.6
    assert found.ece == pytest.approx(100 * ece, abs=1e-5)


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not():
    logits = torch.tensor([[1e4, 0.0], [1e4, 0.0]])
    assert measured(sums(logits, torch.tensor([0, 0])), 2) == Measured(0.0, 0.0, 0.0)
    assert measured(sums(logits, torch.tensor([1, 1])), 2) == Measured(100.0, 1e4, 100.0)


def test_equal_probabilities():
    found = measured(sums(torch.zeros(10, 10), torch.arange(10)), 10)
    assert found == Measured(90.0, round(math.log(10), 6), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_examples_in_batches_follow_the_definition(dtype):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(997, 7, dtype=dtype), torch.randint(7, (997,))
    batches = zip(logits.split(100), labels.split(100), strict=True)
    found = measured(sum(sums(x, y) for x, y in batches), 997)
    nll, ece = expected(logits.double().numpy(), labels.numpy())
    assert found.nll == pytest.approx(nll, abs=1e-6)
    assert found.ece == pytest.approx(ece, abs=1e-5)
    wrong = float((logits.argmax(1) != labels).double().mean())
    assert found.error == pytest.approx(100 * wrong, abs=1e-6)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_logit_that_is_not_finite_gives_finite_values(value):
    logits = torch.tensor([[value, 0.0, 1.0], [0.0, 2.0, 1.0]])
    found = measured(sums(logits, torch.tensor([1, 1])), 2)
    assert all(math.isfinite(number) for number in (found.error, found.nll, found.ece))
