"""The memory that data may take."""

import os

import pytest
import torch

from pyro_sbp import machine
from pyro_sbp.datasets import memory
from pyro_sbp.datasets.memory import available_memory

MIB = 2**20


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A directory in place of that of the control groups, and a function that writes its files."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_host", lambda: 1000 * MIB)

    def write(folder, **files):
        path = tmp_path / "cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (path / name.replace("__", ".")).write_text(f"{content}\n")

    write("")
    return write


def available():
    return available_memory(torch.device("cpu"))


def test_it_is_some_and_no_more_than_the_machine_has():
    assert 0 < available() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_without_a_limit_it_is_that_of_the_host(groups):
    assert available() == 1000 * MIB
    groups("", memory__max="max", memory__current=900 * MIB)
    assert available() == 1000 * MIB
    groups("memory", memory__limit_in_bytes=9223372036854771712)
    assert available() == 1000 * MIB


def test_of_a_container_it_is_what_is_left_of_its_limit(groups):
    groups("", memory__max=500 * MIB, memory__current=400 * MIB)
    assert available() == 100 * MIB
    # Two thirds of what is used are files that the kernel drops when memory is short.
    stat = f"anon 1\nactive_file {9 * MIB}\ninactive_file {250 * MIB}\ntotal_inactive_file 7"
    groups("", memory__stat=stat)
    assert available() == 350 * MIB
    groups("", memory__current=900 * MIB)
    assert available() == 0


def test_version_1_of_control_groups_has_other_names(groups):
    groups("memory", memory__limit_in_bytes=500 * MIB)
    assert available() == 500 * MIB  # it does not say how much of it is used
    stat = f"inactive_file 7\ntotal_inactive_file {250 * MIB}"
    groups("memory", memory__usage_in_bytes=400 * MIB, memory__stat=stat)
    assert available() == 350 * MIB


@pytest.mark.parametrize(
    ("own", "root", "names"),
    [
        ("0::/jobs/7", "", ("memory.max", "memory.current")),
        (
            "4:cpu,memory:/jobs/7\n0::/elsewhere",
            "memory/",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ),
    ],
)
def test_the_group_of_the_process_and_those_around_it_count(groups, tmp_path, own, root, names):
    limit, used = (name.replace(".", "__") for name in names)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"{own}\n")
    groups(f"{root}jobs", **{limit: 300 * MIB, used: 100 * MIB})
    assert available() == 200 * MIB  # that of the process itself does not exist here
    groups(f"{root}jobs/7", **{limit: 90 * MIB, used: 80 * MIB})
    assert available() == 10 * MIB
    groups(f"{root}jobs/8", **{limit: 1, used: 1})  # another process's
    assert available() == 10 * MIB
    groups("", **{limit: 4 * MIB, used: 0} if not root else {})
    assert available() == (10 * MIB if root else 4 * MIB)
