"""Functions that are timed in turn, with a clock that the functions advance."""

import pytest

from pyro_sbp.deployment.blocks import times_in_turn


class Machine:
    """A clock that advances by the duration of each call, which depends on the load."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def clock(self):
        return self.now

    def function(self, name, duration, load=lambda now: 1.0):
        def call():
            self.calls.append(name)
            self.now += duration * load(self.now)

        return call


def test_the_times_are_those_of_one_call_whatever_the_size_of_a_block():
    machine = Machine()
    calls = {"slow": machine.function("slow", 0.125), "fast": machine.function("fast", 2.0**-10)}
    times = times_in_turn(calls, 1.0, machine.clock)
    assert len(times["slow"]) == len(times["fast"]) >= 6
    assert times["slow"] == pytest.approx([0.125] * len(times["slow"]))
    assert times["fast"] == pytest.approx([2.0**-10] * len(times["fast"]))
    # A block of a fast function takes a twenty-fifth of the measurement, that of a slow one a call.
    assert machine.calls.count("fast") / 41 > len(times["fast"]) > machine.calls.count("slow") - 10


def test_slow_functions_are_called_in_six_rounds_in_alternating_order():
    machine = Machine()
    calls = {name: machine.function(name, 100.0) for name in ("a", "b")}
    times = times_in_turn(calls, 1.0, machine.clock)
    assert [len(values) for values in times.values()] == [6, 6]
    assert "".join(machine.calls[-12:]) == "abba" * 3


def test_ratios_of_blocks_are_not_affected_by_a_machine_that_slows_down():
    machine = Machine()

    def load(now):  # the machine becomes ten times slower in the course of the measurement
        return 1.0 + now

    calls = {"a": machine.function("a", 4e-4, load), "b": machine.function("b", 1e-4, load)}
    times = times_in_turn(calls, 4.0, machine.clock)
    assert times["a"][-1] > 5 * times["a"][0]
    for a, b in zip(times["a"], times["b"], strict=True):
        assert a / b == pytest.approx(4.0, rel=0.2)
