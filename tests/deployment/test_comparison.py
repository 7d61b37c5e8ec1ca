"""What a comparison of two networks prints."""

from pyro_sbp.deployment.benchmarking import Comparison, Latency


def latency(**changes):
    values = {"device": "cpu: x", "threads": 1, "batch_size": 128, "dense_ms": 4.0, "speedup": 4.0}
    return Latency(**{**values, "pruned_ms": 1.0, "spread": 0.02, **changes})


def test_it_prints_sizes_and_latencies_as_tables():
    result = Comparison(2_293_000, 186_810, 431_080, 20_576, (latency(),))
    assert str(result).splitlines() == [
        "                dense   pruned   ratio",
        "----------  ---------  -------  ------",
        "MACs        2,293,000  186,810  12.27x",
        "parameters    431,080   20,576  20.95x",
        "",
        "device  threads  batch  dense ms  pruned ms  speed-up  spread",
        "------  -------  -----  --------  ---------  --------  ------",
        "cpu: x        1    128     4.000      1.000     4.00x      2%",
    ]


def test_runtimes_and_the_floor_have_columns_where_they_were_measured():
    rows = (latency(floor_ms=0.5), latency(runtime="compile", floor_ms=0.25))
    head, _, first, second = Comparison(2, 1, 2, 1, rows).latency_table().splitlines()
    assert head.split()[:2] == ["device", "runtime"] and head.endswith("floor")
    assert "eager" in first and first.endswith("0.500")
    assert "compile" in second and second.endswith("0.250")


def test_intervals_have_a_column_where_they_are_known():
    rows = (latency(speedup_low=3.9, speedup_high=4.125), latency(runtime="compile"))
    head, _, first, second = Comparison(2, 1, 2, 1, rows).latency_table().splitlines()
    assert "speed-up  95% interval  spread" in head
    assert first.split()[-5:] == ["4.00x", "3.90", "to", "4.12", "2%"]
    assert second.split()[-3:] == ["4.00x", "-", "2%"]


def test_a_notebook_shows_the_tables():
    class Printer:
        def text(self, words):
            self.words = words

    result, printer = Comparison(2, 1, 2, 1, (latency(),)), Printer()
    result._repr_pretty_(printer, False)
    assert printer.words == str(result)


def test_a_busy_machine_is_named():
    assert "busy" not in str(Comparison(2, 1, 2, 1, (latency(spread=0.3),)))
    last = str(Comparison(2, 1, 2, 1, (latency(), latency(spread=0.31)))).splitlines()[-1]
    assert last == "a spread is over 30%: the machine was busy; measure again"
