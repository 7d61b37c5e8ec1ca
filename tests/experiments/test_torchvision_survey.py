"""The survey of torchvision's networks, on two of them."""

import pytest
import torchvision
from torchvision.models.vision_transformer import VisionTransformer

from pyro_sbp.experiments import torchvision_survey
from pyro_sbp.experiments.torchvision_survey import by_family, main, survey, torch_pruning


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


def tiny_vit(image_size, num_classes):
    return VisionTransformer(image_size, 8, 2, 4, 32, 64, num_classes=num_classes)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
def test_both_libraries_cut_the_same_network(monkeypatch):
    found, original = [], torchvision_survey.find_gates
    tiny_vit.__module__ = "torchvision.models.vision_transformer"
    monkeypatch.setattr(torchvision.models, "get_model_builder", lambda name: tiny_vit)
    monkeypatch.setattr(
        torchvision_survey, "find_gates", lambda *a: found.append(original(*a)) or found[-1]
    )
    ours, theirs = survey("vit_tiny_8"), torch_pruning("vit_tiny_8")
    assert found[0] == found[1] and [gate.size for gate in found[0]] == [4, 64, 4, 64]
    assert ours["max_rel_diff"] <= 1e-10 and theirs["max_rel_diff"] <= 1e-10
