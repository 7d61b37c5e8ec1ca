"""A test that changes the number of threads does not change that of the next."""

import pytest
import torch
from conftest import THREADS


@pytest.mark.parametrize("change", [1, 2])
def test_threads_are_restored(change):
    assert torch.get_num_threads() == THREADS
    torch.set_num_threads(THREADS + change)
