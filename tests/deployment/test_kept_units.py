"""The units of a saved network: read back as they were, and refused if they are damaged."""

import json

import pytest
import torch

from pyro_sbp.deployment.kept_units import read_units, units_from_dicts
from pyro_sbp.gates.units import Units


def test_kept_zeroed_and_removed_units_are_read_back(tmp_path):
    kept, remaining = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 1, 0]]).bool()
    units = {"conv": Units(kept, remaining), "fc": Units(kept[:0], kept[:0])}
    file = tmp_path / "units.json"
    file.write_text(json.dumps({name: unit.to_dict() for name, unit in units.items()}))
    found = read_units(file)
    assert found == units
    assert found["conv"].zeroed.tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"the units are \[\]; expected the units by gate"),
        ({"fc": None}, "the units of 'fc' are None; expected total, kept, zeroed"),
        ({"fc": {"total": 4, "kept": [0]}}, "expected total, kept, zeroed"),
        ({"fc": {"total": 10**30, "kept": [], "zeroed": []}}, "expected at most 16,777,216"),
        ({"fc": {"total": -1, "kept": [], "zeroed": []}}, "'fc' has -1 units"),
        (
            {"fc": {"total": 4, "kept": [4], "zeroed": []}},
            "a list of integers from 0 to 3",
        ),
        ({"fc": {"total": 4, "kept": [], "zeroed": [True]}}, "'fc' has the indices"),
        ({"fc": {"total": 4, "kept": "0", "zeroed": []}}, "'fc' has the indices '0'"),
    ],
)
def test_other_content_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        units_from_dicts(content)


def test_what_is_no_json_is_damaged(tmp_path):
    (tmp_path / "units.json").write_text("{")
    with pytest.raises(ValueError, match=r"^units\.json is damaged: "):
        read_units(tmp_path / "units.json")
