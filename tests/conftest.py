"""Every test starts with the number of threads that pytest was started with."""

import pytest
import torch

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def threads_as_before():
    # Commands set the number of torch. More threads than free cores make later tests slower by
    # several times.
    yield
    torch.set_num_threads(THREADS)
