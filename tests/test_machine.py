"""What the operating system says about the machine."""

from pyro_sbp import machine


def test_the_control_groups_of_a_process_end_at_the_root(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(machine, "CGROUPS", root := tmp_path / "cgroup")
    assert machine.control_groups() == [root]
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/a/b\n4:cpu,cpuacct:/c\n")
    assert machine.control_groups() == [root, root / "a", root / "a" / "b"]
    assert machine.control_groups("cpu") == [root / "cpu", root / "cpu" / "c"]
    assert machine.control_groups("memory") == [root / "memory"]


def test_the_memory_and_the_processor_are_those_of_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.memory_info() == {} and machine.processor_name() != ""
    (tmp_path / "meminfo").write_text("MemTotal: 16 kB\nMemAvailable: 2 kB\nHugePages: 0\n")
    assert machine.memory_info() == {"MemTotal": 16 * 1024, "MemAvailable": 2 * 1024}
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 7763\n")
    assert machine.processor_name() == "AMD EPYC 7763"


def test_the_governor_is_that_of_the_cores_and_may_not_be_readable(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CORES", tmp_path)
    assert machine.cpu_governor() is None
    for core in (0, 1, 10):
        (tmp_path / f"cpu{core}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{core}" / "cpufreq" / "scaling_governor").write_text("schedutil\n")
    (tmp_path / "cpufreq").mkdir()  # the directory of the policies
    assert machine.cpu_governor() == "schedutil"
    (tmp_path / "cpu10" / "cpufreq" / "scaling_governor").write_text("performance\n")
    assert machine.cpu_governor() == "schedutil, performance"
