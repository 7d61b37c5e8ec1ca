"""Damaged checkpoints are refused in one line, or read as what was written."""

import random
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from pyro_sbp.errors import RequestError
from pyro_sbp.training.checkpoints import Checkpoint

OLD = Path(__file__).parent / "old_runs"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint of the present format, and its file."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    Checkpoint.read(OLD / "stopped-sbp" / "checkpoint.pt").write(path)
    return Checkpoint.read(path), path


def equal(a, b):
    """Whether nested values are equal, tensors bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return equal(vars(a), vars(b)) if hasattr(a, "order") else a == b


def read(path):
    """The checkpoint; None if it is refused in one line that names the file."""
    try:
        return Checkpoint.read(path)
    except RequestError as error:
        assert str(error).startswith((f"{path} is damaged: ", f"{path} cannot be read: "))
        assert len(str(error).splitlines()) == 1
        return None


def damaged(content, draw):
    """The bytes with a few flipped bits, or with a stretch cut off, taken out, zeroed or moved."""
    first, last = sorted(draw.sample(range(len(content)), 2))
    match draw.randrange(8):
        case 0:
            return content[:first]
        case 1:
            return content[:first] + content[last:]
        case 2:
            last = min(last, first + 200)
            return content[:first] + bytes(last - first) + content[last:]
        case 3:
            return content[last:] + content[:last]
        case _:
            flipped = bytearray(content)
            for _ in range(draw.choice((1, 1, 3))):
                # Half of them in the directory at the end of the archive.
                start = draw.choice((0, len(content) - 6000))
                flipped[draw.randrange(start, len(content))] ^= 1 << draw.randrange(8)
            return bytes(flipped)


@pytest.mark.parametrize("old", [False, True], ids=["present", "old"])
def test_damaged_bytes_are_refused_or_harmless(written, tmp_path, old):
    source = OLD / "stopped-rbp" / "checkpoint.pt" if old else written[1]
    whole, content, path = Checkpoint.read(source), source.read_bytes(), tmp_path / "damaged.pt"
    draw, refused = random.Random(0), 0
    for _ in range(100):
        path.write_bytes(damaged(content, draw))
        found = read(path)
        refused += found is None
        assert found is None or all(
            equal(getattr(found, field.name), getattr(whole, field.name)) for field in fields(whole)
        )
    assert refused > 50


def test_a_damage_with_right_checksums_is_refused_or_harmless(written, tmp_path):
    with zipfile.ZipFile(written[1]) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in records if name.endswith("data.pkl"))
    draw, path, refused = random.Random(0), tmp_path / "damaged.pt", 0
    for _ in range(100):
        pickled = bytearray(records[name])
        pickled[draw.randrange(len(pickled))] = draw.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for record, content in records.items():
                archive.writestr(record, bytes(pickled) if record == name else content)
        refused += read(path) is None
    assert refused > 50


def test_changed_values_are_refused_though_the_zip_file_is_right(written, tmp_path):
    path = tmp_path / "checkpoint.pt"
    changes = {
        "posteriors": lambda saved: next(iter(saved["posteriors"].values()))[0][0].add_(0.1),
        "module": lambda saved: next(iter(saved["current"]["module"].values())).flatten()[0].neg_(),
        "seconds": lambda saved: saved.update(seconds=saved["seconds"] + 1),
    }
    for change in changes.values():
        saved = torch.load(written[1], weights_only=True)
        change(saved)
        torch.save(saved, path)
        with pytest.raises(RequestError, match="is damaged: its values differ from their checksum"):
            Checkpoint.read(path)


def test_a_checkpoint_of_an_earlier_version_is_read(written, tmp_path):
    saved = torch.load(written[1], weights_only=True)
    del saved["checksum"], saved["gates"], saved["calibration"]
    torch.save(saved, tmp_path / "checkpoint.pt")
    found = Checkpoint.read(tmp_path / "checkpoint.pt")
    assert equal(found.posteriors, written[0].posteriors) and found.gates is None
    assert found.calibration is None


@pytest.mark.parametrize("value", [torch.zeros(2, 2), [], "format", 3, None, {}, {"format": [2]}])
def test_a_file_of_something_else_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "checkpoint.pt")
    assert read(tmp_path / "checkpoint.pt") is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("request", 3, "request: expected a valid string"),
        ("request", "[", "it is not the checkpoint of a run"),
        ("finished", 3, "finished: expected a valid list"),
        ("finished", [3], "finished 0: expected a valid dictionary"),
        ("current", {"module": torch.zeros(2)}, "current module: expected a valid dictionary"),
        ("optimizer", None, "optimizer: expected a valid dictionary"),
        ("schedule", [1], "schedule: expected a valid dictionary"),
        ("place", {"order": 1}, "place order: expected an instance of Tensor"),
        ("errors", {"test": {"dense": "x"}}, "errors test dense: expected a valid number"),
        ("seconds", -1.0, "seconds: expected greater than or equal to 0"),
        ("lines", [{"units": {}}], "lines 0 phase is missing"),
        ("order", 3, "order: expected an instance of Tensor"),
        ("random", [{"cpu": 3}], "random 0 cpu: expected an instance of Tensor"),
        ("left_alone", {"fc1": 3}, "left_alone fc1: expected a valid string"),
        ("posteriors", None, "posteriors: expected a valid dictionary"),
        ("posteriors", {"fc1": (torch.zeros(2), 1)}, "posteriors fc1 1: expected an instance"),
        ("posteriors", ..., "posteriors is missing"),
        ("gates", {"fc1": -1}, "gates fc1: expected greater than or equal to 0"),
        ("calibration", {"test": {"mean": 1.0}}, "calibration test mean: expected a valid dict"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(written, tmp_path, name, value, words):
    saved = torch.load(written[1], weights_only=True)
    del saved["checksum"]
    saved[name] = value
    if value is ...:
        del saved[name]
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(RequestError, match=f"is damaged: {words}"):
        Checkpoint.read(tmp_path / "checkpoint.pt")
