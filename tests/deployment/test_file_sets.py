"""Files that are replaced together: whatever fails, the old or the new ones are whole."""

import json
import os

import pytest

from pyro_sbp.deployment import file_sets
from pyro_sbp.deployment.file_sets import checksum, complete, locate, part, replace


def write(directory, **contents):
    """Replace files; the index has their checksums as JSON."""
    writers = {
        name: lambda path, text=text: path.write_text(text) for name, text in contents.items()
    }
    replace(directory, writers, "index", lambda sums: json.dumps(dict(sums)), others=("c",))


def contents(directory):
    """What the index means, by name."""
    index = json.loads((directory / "index").read_text())
    found = {name: locate(directory, name, expected) for name, expected in index.items()}
    return {name: path.read_text() for name, path in found.items()}


@pytest.fixture
def old(tmp_path):
    write(tmp_path, a="1", b="2")
    (tmp_path / "c").write_text("of an earlier set")
    return tmp_path


def test_new_files_take_the_place_of_old_ones(old):
    write(old, a="3", b="4")
    assert contents(old) == {"a": "3", "b": "4"}
    assert {path.name for path in old.iterdir()} == {"a", "b", "index"}


def test_a_writer_that_fails_changes_nothing(old):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        replace(old, {"a": lambda path: path.write_text("3"), "b": fail}, "index", json.dumps)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_renaming_that_fails_leaves_the_old_or_the_new_files(old, monkeypatch, count):
    original, left = os.replace, count

    def failing(*paths):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError("no renaming")
        original(*paths)

    monkeypatch.setattr(file_sets.os, "replace", failing)
    with pytest.raises(OSError, match="no renaming"):
        write(old, a="3", b="4")
    monkeypatch.undo()
    # The first renaming is that of the index.
    expected = {"a": "1", "b": "2"} if count == 1 else {"a": "3", "b": "4"}
    assert contents(old) == expected
    complete(old, json.loads((old / "index").read_text()))
    assert contents(old) == expected
    assert not list(old.glob(f"*{file_sets.PART}"))


def test_a_file_with_another_checksum_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_text("abc")
    # The first example of FIPS 180-2, appendix B.1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert checksum(path) == expected and locate(tmp_path, "a", expected) == path
    path.write_text("abd")
    assert locate(tmp_path, "a", None) == path
    with pytest.raises(ValueError, match="a is damaged: it differs from its checksum"):
        locate(tmp_path, "a", expected)
    part(path).write_text("abc")
    assert locate(tmp_path, "a", expected) == part(path)


def test_what_is_not_there_is_not_found(tmp_path):
    assert locate(tmp_path, "a", "0" * 64) is None
    part(tmp_path / "a").write_text("half")
    assert locate(tmp_path, "a", None) is None and locate(tmp_path, "a", "0" * 64) is None
