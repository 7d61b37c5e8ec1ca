"""The memory that data may take."""

import os

import torch

from pyro_sbp.datasets import memory
from pyro_sbp.datasets.memory import available_memory


def test_it_is_some_and_no_more_than_the_machine_has():
    found = available_memory(torch.device("cpu"))
    assert 0 < found <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    limits = [tmp_path / "memory.max", tmp_path / "limit_in_bytes"]
    monkeypatch.setattr(memory, "LIMITS", [str(path) for path in limits])
    free = available_memory(torch.device("cpu"))
    assert free > 2**20
    limits[0].write_text("max\n")
    assert available_memory(torch.device("cpu")) > 2**20
    limits[1].write_text(f"{2**20}\n")
    assert available_memory(torch.device("cpu")) == 2**20
