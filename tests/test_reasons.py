"""The reasons why layers are not prunable, as text."""

from pyro_sbp.reasons import lines_not_prunable, reasons_by_share


def test_the_largest_layers_come_first_and_the_others_are_counted():
    shares = {"a": (0.1, 0.5), "b": (0.3,), "c": (0.2, 0.1)}
    why = {**dict.fromkeys(shares, "why"), "d": "why"}
    assert lines_not_prunable(why, shares, 2, "there") == [
        "not prunable: b, why (30.0% of the parameters)",
        "not prunable: c, why (20.0% of the parameters, 10.0% of the MACs)",
        "and 2 more, in there",
    ]
    assert lines_not_prunable({"d": "why"}, {}, 1) == ["not prunable: d, why"]


def test_the_network_itself_has_no_name():
    assert reasons_by_share({"": "why"}, {}) == ["the network: why"]
