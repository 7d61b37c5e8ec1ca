"""Every test starts with the number of threads and the digits of mpmath of the first test."""

import gc
import warnings

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
def files_of_a_killed_worker():
    """For tests that kill a worker of a `DataLoader`.

    torch then opens temporary files, to find out whether too many are open, and leaves them to the
    garbage collector, whose warning would be an error of a later test.
    """
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def seeded():
    """Pyro with seed 0, an empty parameter store and validation."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
