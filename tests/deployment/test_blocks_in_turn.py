"""Functions that are timed in turn, with a clock that the functions advance."""

import pytest

from pyro_sbp.deployment import blocks
from pyro_sbp.deployment.blocks import ratios, times_in_turn
from pyro_sbp.deployment.intervals import median_interval


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
    times = times_in_turn(calls, 1.0, machine.clock, block=2e-3)
    assert len(times["slow"]) == len(times["fast"]) >= 6
    assert times["slow"] == pytest.approx([0.125] * len(times["slow"]))
    assert times["fast"] == pytest.approx([2.0**-10] * len(times["fast"]))
    # A block of the slow function is one call; one of the fast function is two calls, about 2 ms.
    of_rounds = machine.calls[-3 * len(times["slow"]) :]
    assert of_rounds.count("slow") == len(times["slow"])
    assert of_rounds.count("fast") == 2 * len(times["slow"])


def test_slow_functions_are_called_in_six_rounds_in_random_order():
    machine = Machine()
    calls = {name: machine.function(name, 100.0) for name in ("a", "b")}
    times = times_in_turn(calls, 1.0, machine.clock)
    assert [len(values) for values in times.values()] == [6, 6]
    last = "".join(machine.calls[-12:])
    assert {last[place : place + 2] for place in range(0, 12, 2)} == {"ab", "ba"}


def test_interruptions_at_regular_intervals_affect_all_functions_alike():
    machine = Machine()

    class Slices:
        """Every 3 ms of work, the operating system runs another process for 30 ms."""

        left = 3e-3

        def work(self, name):
            machine.calls.append(name)
            machine.now += 1e-4
            self.left -= 1e-4
            if self.left < 0:
                machine.now += 30e-3
                self.left = 3e-3

    slices = Slices()
    # Three blocks of 1 ms last as long as a slice.
    calls = {name: (lambda name=name: slices.work(name)) for name in ("a", "b", "c")}
    times = times_in_turn(calls, 3.0, machine.clock, block=1e-3)
    interrupted = [sum(time > 1e-3 for time in values) / len(values) for values in times.values()]
    assert interrupted == pytest.approx([1 / 3] * 3, abs=0.12)
    assert median_interval(ratios(times["a"], times["b"])) == pytest.approx((1.0, 1.0))


def test_ratios_of_blocks_are_not_affected_by_a_machine_that_slows_down():
    machine = Machine()

    def load(now):  # the machine becomes ten times slower in the course of the measurement
        return 1.0 + now

    calls = {"a": machine.function("a", 4e-4, load), "b": machine.function("b", 1e-4, load)}
    times = times_in_turn(calls, 4.0, machine.clock)
    assert times["a"][-1] > 5 * times["a"][0]
    found = ratios(times["a"], times["b"])
    assert len(found) == 25 and found == pytest.approx([4.0] * 25, rel=0.01)


def test_a_group_has_the_ratio_of_the_medians_of_consecutive_rounds():
    # Groups of one, two and two rounds, with medians 6, 5 and 11 over 2, 2 and 2.
    first, second = [6.0, 4.0, 6.0, 10.0, 12.0], [2.0, 1.0, 3.0, 2.0, 2.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "GROUPS", 3)
        assert ratios(first, second) == [3.0, 2.5, 5.5]
    assert ratios(first, second) == [3.0, 4.0, 2.0, 5.0, 6.0]


def test_a_group_is_not_affected_by_a_few_interrupted_blocks():
    first = [4.0] * 100
    second = [1.0] * 100
    for place in range(0, 100, 4):  # one of the four blocks of every group
        second[place + place // 4 % 4] *= 50.0
    assert ratios(first, second) == [4.0] * 25
