"""Whether a data set on disk is present, missing or damaged."""

import socket
import struct

import pytest

from pyro_sbp.datasets import status
from pyro_sbp.datasets.sources import SOURCES
from pyro_sbp.datasets.status import DatasetStatus, dataset_status
from pyro_sbp.errors import RequestError


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "socket", refuse)


def idx_file(path, images=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0\0\x08\x01" + struct.pack(">I", images) + bytes(images))


def image_folder(root, parts=("train", "test"), classes=("a", "b")):
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            (root / part / name / "1.png").touch()
    return f"folder:{root}"


def test_nothing_is_missing(tmp_path):
    for name in SOURCES:
        assert dataset_status(name, tmp_path / "nowhere") == DatasetStatus("missing")


def test_files_of_idx(tmp_path):
    source = SOURCES["mnist"]
    for count, file in enumerate(source.files):
        if count:
            found = dataset_status("mnist", tmp_path)
            assert found == DatasetStatus("damaged", f"{count} of 4 files")
        idx_file(tmp_path / source.folder / file)
    assert dataset_status("mnist", tmp_path) == DatasetStatus("present")
    path = tmp_path / source.folder / source.files[2]
    path.write_bytes(path.read_bytes()[:-1])
    found = dataset_status("mnist", tmp_path)
    assert found.state == "damaged" and str(tmp_path) not in found.detail
    assert found.detail.startswith(f"{source.folder}/{source.files[2]} is damaged: it has ")


def test_archives(tmp_path):
    source = SOURCES["cifar10"]
    (tmp_path / source.archives[0]).touch()
    assert dataset_status("cifar10", tmp_path) == DatasetStatus("present", "not unpacked yet")
    (tmp_path / SOURCES["mnist"].folder).mkdir(parents=True)
    (tmp_path / SOURCES["mnist"].archives[0]).touch()
    assert dataset_status("mnist", tmp_path) == DatasetStatus("damaged", "1 of 4 archives")


def test_image_folders(tmp_path):
    name = image_folder(tmp_path / "images")
    assert dataset_status(name, tmp_path) == DatasetStatus("present", "2 classes")
    (tmp_path / "images" / "test" / "b" / "1.png").unlink()
    found = dataset_status(name, tmp_path)
    assert found.state == "damaged" and found.detail.startswith("test/b has no images")
    found = dataset_status(f"folder:{tmp_path / 'none'}", tmp_path)
    assert found == DatasetStatus("missing", "there is no such directory")


def test_digits_are_part_of_a_package(tmp_path, monkeypatch):
    assert dataset_status("digits", tmp_path).state == "present"
    monkeypatch.setattr(status, "find_spec", lambda name: None)
    assert dataset_status("digits", tmp_path).state == "missing"


def test_a_file_that_cannot_be_read_is_damaged(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "file"))

    monkeypatch.setattr(status, "check_dataset", refuse)
    for file in SOURCES["mnist"].files:
        idx_file(tmp_path / SOURCES["mnist"].folder / file)
    found = dataset_status("mnist", tmp_path)
    assert found == DatasetStatus("damaged", "[Errno 13] Permission denied: 'file'")


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"unknown data set 'minst'.*did you mean 'mnist'"):
        dataset_status("minst", tmp_path)
