"""The survey of torchvision's networks, on two of them."""

from pyro_sbp.experiments.torchvision_survey import by_family, main, survey


def test_a_network_is_cut_exactly_and_what_is_left_alone_has_a_reason():
    row = survey("shufflenet_v2_x0_5")
    assert row["gates"] == 18 and row["macs_left"] < 0.75
    assert row["max_rel_diff"] <= 1e-10
    assert row["left_alone"]["cannot be cut exactly"] == 19
    rows = [row, {**row, "gates": 20}, {"network": "other", "failed": "not finished after 3 s"}]
    table = list(by_family(rows))
    assert "18 to 20" in table[2] and "not finished" in table[3]


def test_a_network_that_takes_too_long_is_named(capsys):
    main(["squeezenet1_1", "--limit", "0.01"])
    assert "| squeezenet1_1 | not finished after 0.01 s |" in capsys.readouterr().out
