"""Warnings of a command are single lines; without the command line, Python prints them."""

import subprocess
import sys
import warnings

import pytest

from pyro_sbp.cli.warning_lines import print_warnings_as_lines

NETWORK = """
import warnings

warnings.warn("the layer is old\\n  and slow", stacklevel=2)
"""


@pytest.fixture
def lines(capsys):
    """A function that returns what a warning prints."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        print_warnings_as_lines()

        def printed(*args, **kwargs):
            warnings.warn(*args, **kwargs, stacklevel=1)
            out, err = capsys.readouterr()
            assert out == ""
            return err

        yield printed


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no unit reaches the threshold", "no unit reaches the threshold"),
        ("first line\n\n   second line\n", "first line second line"),
        (
            "nested tensors are a prototype (Triggered internally at /pytorch/aten/src/a.cpp:53.)",
            "nested tensors are a prototype",
        ),
        ("", "UserWarning"),
    ],
)
def test_a_warning_is_one_line_on_stderr(lines, text, line):
    assert lines(text) == f"Warning: {line}\n"


def test_the_category_is_not_printed(lines):
    assert lines("`a` is deprecated: use `b`", FutureWarning) == (
        "Warning: `a` is deprecated: use `b`\n"
    )


def test_a_closed_stderr_does_not_end_the_command(lines, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    for stderr in (Closed(), None):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            warnings.warn("lost", stacklevel=1)


@pytest.mark.slow
def test_the_program_prints_lines_and_other_programs_do_not(tmp_path):
    (tmp_path / "old_network.py").write_text(NETWORK)
    arguments = ["train", "--arch", "old_network:missing", "--dataset", "digits"]
    command = [sys.executable, "-m", "pyro_sbp.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    printed = done.stderr.splitlines()
    assert "Warning: the layer is old and slow" in printed and printed[-1].startswith("Error: ")
    assert "UserWarning" not in done.stderr
    assert done.returncode == 2
    command = [sys.executable, "-c", "import pyro_sbp.cli.warning_lines, old_network"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "UserWarning: the layer is old" in done.stderr
