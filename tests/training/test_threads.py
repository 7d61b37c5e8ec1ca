"""How many CPU threads a run takes, on machines that are described by files."""

import os

import pytest

from pyro_sbp import machine as system
from pyro_sbp.training import threads
from pyro_sbp.training.threads import Cores, ThreadChoice, choose_threads, measure_cores


class Machine:
    """Files as Linux has them under /proc and /sys, which change while a process sleeps."""

    def __init__(self, root, monkeypatch):
        self.root = root
        self.before = []
        self.clock = 100.0
        self.changes = []
        self.monkeypatch = monkeypatch
        for module, name in ((system, "PROC"), (system, "CGROUPS"), (threads, "CPUS")):
            monkeypatch.setattr(module, name, root / name)
        for name in threads.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(threads.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(threads.time, "process_time", lambda: 0.0)
        monkeypatch.setattr(threads.time, "sleep", self.sleep)
        monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))

    def write(self, path, text):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def sleep(self, seconds):
        self.clock += seconds
        for path, text in self.changes:
            self.write(path, text)

    def cpus(self, busy, allowed=None, siblings=None):
        """CPUs with the shares of their time that they work for others."""
        allowed = range(len(busy)) if allowed is None else allowed
        self.monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed), raising=False)

        def stat(seconds):
            lines = ["cpu  0 0 0 0 0 0 0 0 0 0"]
            for cpu, share in enumerate(busy):
                work = round(share * seconds * 1000)
                rest = round(seconds * 1000) - work
                # Half of the work is stolen by other virtual machines, half of the rest waits.
                user, idle = 5000 + work - work // 2, 9000 + rest - rest // 2
                lines.append(f"cpu{cpu} {user} 0 7 {idle} {rest // 2} 0 0 {work // 2} 11 0")
            return "\n".join([*lines, "ctxt 1"])

        self.write("PROC/stat", stat(0))
        self.changes.append(("PROC/stat", stat(1)))
        for cpu, text in enumerate(siblings or []):
            self.write(f"CPUS/cpu{cpu}/topology/thread_siblings_list", text + "\n")

    def group(self, place, quota, used, version=2):
        """A control group with a quota, whose processes use `used` cores."""
        first, last = 5.0, 5.0 + 0.25 * used
        if version == 2:
            self.write(f"CGROUPS/{place}/cpu.max", quota + "\n")
            file, unit, word = f"CGROUPS/{place}/cpu.stat", 1e6, "usage_usec "
        else:
            amount, period = quota.split()
            self.write(f"CGROUPS/cpu/{place}/cpu.cfs_quota_us", amount)
            self.write(f"CGROUPS/cpu/{place}/cpu.cfs_period_us", period)
            file, unit, word = f"CGROUPS/cpuacct/{place}/cpuacct.usage", 1e9, ""
        self.write(file, f"{word}{round(first * unit)}\nuser_usec 1\n")
        self.changes.append((file, f"{word}{round(last * unit)}\nuser_usec 1\n"))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        ([0, 0, 0, 0], 4),
        ([1, 0, 0, 0], 3),
        ([0.5, 0.5, 0.5, 0.5], 2),
        ([0.05, 0.05, 0.05, 0.03], 4),
        ([0.5, 0, 0, 0], 3),
        ([1, 1, 1, 1], 1),
        ([1], 1),
        ([0], 1),
    ],
)
def test_there_is_a_thread_for_each_free_core_and_at_least_one(machine, busy, expected):
    machine.cpus(busy)
    choice = choose_threads()
    assert choice.threads == expected and choice.source == "free cores"
    assert choice.cores.usable == len(busy)
    assert choice.cores.busy == pytest.approx(sum(busy), abs=0.01)
    assert (choice.warning is None) == (sum(busy) < 0.2)


def test_only_the_cpus_that_the_process_may_use_count(machine):
    machine.cpus([1, 1, 0, 0, 0, 1], allowed={2, 3, 5})
    assert choose_threads().threads == 2
    assert choose_threads().cores.usable == 3


def test_cpus_of_one_core_are_one(machine):
    siblings = ["0,4", "1,5", "2,6", "3,7"] * 2
    machine.cpus([0] * 8, siblings=siblings)
    assert choose_threads().threads == 4
    machine.changes.clear()
    # Four busy CPUs on two cores, and on four.
    machine.cpus([1, 1, 0, 0, 1, 1, 0, 0], siblings=siblings)
    assert choose_threads().threads == 2
    machine.changes.clear()
    machine.cpus([1, 1, 1, 1, 0, 0, 0, 0], siblings=siblings)
    assert choose_threads().threads == 1
    machine.cpus([0] * 4, siblings=["0-1", "0-1", "2-3", "2-3"])
    assert measure_cores().usable == 2


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quota", "used", "expected"),
    [
        ("200000 100000", 0.0, 2),
        ("200000 100000", 1.0, 1),
        ("150000 100000", 0.0, 1),
        ("50000 100000", 0.0, 1),
        ("1600000 100000", 0.0, 8),
        ("400000 100000", 9.0, 1),
    ],
)
def test_the_quota_of_a_container_counts_with_what_is_used_of_it(
    machine, version, quota, used, expected
):
    machine.cpus([0] * 8)
    machine.write("PROC/self/cgroup", "0::/\n" if version == 2 else "3:cpuset:/\n1:cpu,cpuacct:/\n")
    machine.group(".", quota, used, version)
    choice = choose_threads()
    assert choice.threads == expected
    amount, period = map(int, quota.split())
    assert choice.cores.usable == min(8, amount / period)
    assert (choice.warning is None) == (used == 0)


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_quota_above_a_process_holds(machine, version):
    machine.cpus([0] * 8)
    line = "0::/a/b/c\n" if version == 2 else "1:cpu:/a/b/c\n"
    machine.write("PROC/self/cgroup", line)
    machine.group("a/b/c", "600000 100000", 0.0, version)
    machine.group("a", "300000 100000", 1.0, version)
    assert choose_threads().threads == 2
    assert measure_cores().usable == 3


@pytest.mark.parametrize("line", ["0::/docker/1234\n", "1:cpu:/docker/1234\n"])
def test_a_container_that_sees_only_its_own_group_finds_its_quota(machine, line):
    machine.cpus([0] * 8)
    machine.write("PROC/self/cgroup", line)
    machine.group(".", "200000 100000", 0.0, 2 if line.startswith("0") else 1)
    assert choose_threads().threads == 2


def test_no_quota_is_no_limit(machine):
    machine.cpus([0] * 8)
    machine.write("PROC/self/cgroup", "1:cpu:/\n0::/\n")
    machine.write("CGROUPS/cpu.max", "max 100000\n")
    machine.group(".", "-1 100000", 0.0, 1)
    assert choose_threads().threads == 8


@pytest.mark.parametrize("text", [None, "", "cpu  1 2 3 4\n", "cpu0 0 0 0 0 0 0 0 0\n"])
def test_without_times_of_each_cpu_the_load_average_stands_for_them(machine, monkeypatch, text):
    machine.cpus([0, 0, 0, 0])
    machine.changes.clear()
    (machine.root / "PROC" / "stat").unlink()
    if text is not None:
        machine.write("PROC/stat", text)
    assert choose_threads().threads == 4
    monkeypatch.setattr(os, "getloadavg", lambda: (2.1, 9.0, 9.0))
    assert choose_threads().threads == 2
    monkeypatch.setattr(os, "getloadavg", lambda: (64.0, 9.0, 9.0))
    assert choose_threads().threads == 1
    monkeypatch.delattr(os, "getloadavg")
    assert choose_threads().threads == 4


def test_the_work_of_this_process_does_not_make_the_machine_busy(machine, monkeypatch):
    machine.cpus([1, 0, 0, 0])
    monkeypatch.setattr(threads.time, "process_time", lambda: machine.clock)
    assert choose_threads().threads == 4


@pytest.mark.parametrize(("processes", "expected"), [(1, 8), (2, 4), (3, 2), (8, 1), (20, 1)])
def test_processes_share_the_free_cores(machine, processes, expected):
    machine.cpus([0] * 8)
    choice = choose_threads(processes=processes)
    assert choice.threads == expected and choice.warning is None


@pytest.mark.parametrize(
    ("variables", "expected", "source"),
    [
        ({"OMP_NUM_THREADS": "2"}, 2, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": " 2, 3"}, 2, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "64"}, 4, "OMP_NUM_THREADS"),
        ({"MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "2"}, 1, "MKL_NUM_THREADS"),
        ({"MKL_NUM_THREADS": "", "OMP_NUM_THREADS": "2"}, 2, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "abc"}, 3, "free cores"),
        ({"OMP_NUM_THREADS": "0"}, 3, "free cores"),
        ({"OMP_NUM_THREADS": "-1"}, 3, "free cores"),
        ({"OMP_NUM_THREADS": "2.5"}, 3, "free cores"),
    ],
)
def test_the_user_s_variables_hold(machine, monkeypatch, variables, expected, source):
    machine.cpus([1, 0, 0, 0])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for processes in (1,) if source == "free cores" else (1, 2):
        choice = choose_threads(processes=processes)
        assert (choice.threads, choice.source) == (expected, source)


def test_the_given_number_comes_first_and_nothing_is_measured(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(threads, "measure_cores", None)
    assert choose_threads(7, processes=2) == ThreadChoice(7, "--threads", 2)
    assert choose_threads().warning is None


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (ThreadChoice(1, "", 1, Cores(2, 1.94)), "use 1.9 of 2 cores; computing with 1 thread ("),
        (ThreadChoice(2, "", 1, Cores(4, 2.0)), "use 2 of 4 cores; computing with 2 threads ("),
        (ThreadChoice(1, "", 2, Cores(2.5, 1)), "use 1 of 2.5 cores; computing with 1 thread in "),
        (ThreadChoice(1, "", 1, Cores(1, 1)), "use 1 of 1 cores; computing with 1 thread ("),
    ],
)
def test_the_warning_says_what_is_busy_and_what_is_used(choice, words):
    assert words in choice.warning and choice.warning.startswith("the machine is busy: ")
    assert "\n" not in choice.warning


@pytest.mark.parametrize(
    "choice",
    [
        ThreadChoice(1, "", 4, Cores(2, 0)),
        ThreadChoice(1, "", 1, Cores(0.5, 0)),
        ThreadChoice(2, "", 1, Cores(2, 0.1)),
        ThreadChoice(3, "--threads"),
    ],
)
def test_an_idle_machine_is_not_warned_of(choice):
    assert choice.warning is None


def test_this_machine_can_be_measured():
    cores = measure_cores(0.05)
    assert 0 < cores.usable <= (os.cpu_count() or 1) and 0 <= cores.busy <= cores.usable


def test_a_run_that_resumes_keeps_its_threads_unless_the_user_says_otherwise(monkeypatch):
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_usable_cpus", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "measure_cores", lambda: threads.Cores(4.0, 3.0))
    choice = threads.choose_threads(None, 1, recorded=2)
    assert (choice.threads, choice.source) == (2, "the run")
    assert "other processes use 3 of 4 cores; computing with 2 threads" in choice.warning
    assert threads.choose_threads(None, 1, recorded=16).threads == 4
    assert threads.choose_threads(3, 1, recorded=2).threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.choose_threads(None, 1, recorded=2).threads == 1
