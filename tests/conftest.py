"""Every test starts with the number of threads and the digits of mpmath of the first test."""

import pyro
import pytest
import torch
from mpmath import mp

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def threads_as_before():
    # Commands set the number of torch. More threads than free cores make later tests slower by
    # several times.
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def digits_as_before():
    digits = mp.dps
    yield
    mp.dps = digits


@pytest.fixture
def seeded():
    """Pyro with seed 0, an empty parameter store and validation."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
