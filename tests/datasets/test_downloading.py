"""Downloads that fail name their cause, and nothing is called damaged that is not there."""

import errno
import gzip
import os
import tarfile
import zlib
from http.client import IncompleteRead
from urllib.error import HTTPError, URLError

import pytest
from torchvision.datasets import mnist

from pyro_sbp.datasets import sources
from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.datasets.sources import SOURCES
from pyro_sbp.errors import RequestError

FULL = os.strerror(errno.ENOSPC)


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """As behind a proxy: only the download itself finds out that it fails."""
    monkeypatch.setattr(sources, "_reachable", lambda host: True)


def refusal(tmp_path, name="mnist"):
    with pytest.raises(RequestError) as refused:
        load_dataset(name, tmp_path)
    words = str(refused.value)
    assert "\n" not in words
    return words


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (URLError(OSError(errno.ENETUNREACH, "Network is unreachable")), "Network is unreachable"),
        (HTTPError("http://x", 503, "Service Unavailable", {}, None), "Service Unavailable"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset"),
        (IncompleteRead(b"half"), "IncompleteRead"),
    ],
)
def test_a_failed_download_is_not_damaged_data(name, error, cause, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", fail)
    words = refusal(tmp_path, name)
    folder = tmp_path / SOURCES[name].folder
    assert words.startswith(
        f"{name} is missing or incomplete in {folder}, and cannot be downloaded"
    )
    assert cause in words and "--data-dir" in words and "--dataset digits" in words
    assert "damaged" not in words and "delete" not in words


def test_a_truncated_archive_is_downloaded_again(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in SOURCES["mnist"].files:
        (raw / f"{file}.gz").write_bytes(gzip.compress(b"\0" * 100)[:50])

    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    words = refusal(tmp_path)
    assert "is missing or incomplete in " in words
    assert "and cannot be downloaded (<urlopen error no network>)" in words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, FULL), f"does not fit into .*{FULL}.*: free some space"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "does not fit into .* free some space"),
        (PermissionError(errno.EACCES, "denied", "x.gz"), r"cannot be written to .*denied: x\.gz"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "cannot be written to .*Read-only"),
        (EOFError("Compressed file ended"), "cannot be unpacked in .*: delete its archives"),
        (gzip.BadGzipFile("Not a gzipped file"), "cannot be unpacked .*Not a gzipped file"),
        (tarfile.ReadError("unexpected end of data"), "cannot be unpacked .*unexpected end"),
        (zlib.error("invalid block type"), "cannot be unpacked .*invalid block type"),
    ],
)
def test_a_download_that_cannot_be_stored_says_why(error, words, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(mnist, "download_and_extract_archive", fail)
    with pytest.raises(RequestError, match=f"^mnist {words}"):
        load_dataset("mnist", tmp_path)


def test_a_data_directory_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    words = refusal(tmp_path / "file")
    assert words.startswith("mnist cannot be written to ") and "Not a directory" in words


def write_damaged(raw, content):
    raw.mkdir(parents=True)
    for file in SOURCES["mnist"].files:
        (raw / file).write_bytes(content)


def test_files_that_may_not_be_read_are_not_damaged(tmp_path, monkeypatch):
    write_damaged(tmp_path / "MNIST" / "raw", b"\0\0\x08\x01\0\0\0\0")

    def fail(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(mnist, "read_image_file", fail)
    words = refusal(tmp_path)
    assert "cannot be read" in words and "Permission denied" in words and "delete" not in words


@pytest.mark.parametrize("kind", [b"\x01", b"\x08", b"\x0b"])
def test_damaged_files_are_to_be_deleted(kind, tmp_path):
    # As long as its head says, but of another type or shape than images have.
    write_damaged(tmp_path / "MNIST" / "raw", b"\0\0" + kind + b"\x01\0\0\0\x02ab")
    assert "is damaged" in (words := refusal(tmp_path)) and "delete it" in words
