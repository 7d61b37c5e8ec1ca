"""Commands on damaged run directories: one line that names the cause, and no traceback."""

import json
import math
import random
import shutil

import pytest
import torch
from helpers import run, stops_after, train_quickly

from pyro_sbp.cli.stopping import Stopped

#: Files of a run, and the commands that read them.
COMMANDS = (
    ("inspect",),
    ("report", "--no-sweep"),
    ("prune", "--threshold", "1.5"),
    ("bench", "--seconds", "0.001", "--batch-size", "1", "--threads", "1"),
    ("export", "--format", "pt2"),
    ("train", "--resume"),
)
FILES = (
    "recipe.json",
    "summary.json",
    "metrics.jsonl",
    "pruned/network.json",
    "pruned/units.json",
    "bench.json",
)
#: Values of wrong types, and of right types that make no sense.
WRONG = (None, True, -1, 10**40, 0.5, math.nan, math.inf, "", "x", [], ["x"], [[]], {}, {"x": 1})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run, and the arguments that made it."""
    directory, _, args = train_quickly("sbp", tmp_path_factory.mktemp("runs"))
    return directory, args


@pytest.fixture(scope="module")
def finished(trained):
    directory, _ = trained
    assert run("bench", directory, "--seconds", "0.001", "--batch-size", "1").exit_code == 0
    return directory


@pytest.fixture(scope="module")
def stopped(trained, tmp_path_factory):
    """A run that was stopped in the phase with noise."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    with stops_after(100), pytest.raises(Stopped):
        run(*trained[1], "--output-dir", directory)
    return directory


def places(value, path=()):
    """All places of a nested value, from the outside in."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value, path, other):
    """A nested value with another one at a place; `...` takes the place away."""
    if not path:
        return other
    key, *rest = path
    copy = value.copy()
    if not rest and other is ...:
        del copy[key]
    else:
        copy[key] = replaced(copy[key], rest, other)
    return copy


def damaged(text, lines, draw):
    """A JSON text with one random damage."""
    kind = draw.choice(("cut", "flip", "value", "value", "value", "gone"))
    if kind == "cut":
        return text[: draw.randrange(len(text))]
    if kind == "flip":
        at = draw.randrange(len(text))
        return text[:at] + chr(draw.randrange(32, 1000)) + text[at + 1 :]
    values = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    path = draw.choice(list(places(values))[1:])
    values = replaced(values, path, ... if kind == "gone" else draw.choice(WRONG))
    return "\n".join(map(json.dumps, values)) if lines else json.dumps(values)


def outcome(words, directory):
    """The exit status, and what was said, of a command on a run directory."""
    result = run(*words, directory)
    said = result.stderr.strip().splitlines()
    assert result.exception is None or isinstance(result.exception, SystemExit), (
        words,
        directory,
        repr(result.exception),
    )
    return result.exit_code, said


@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 24))]
)
def test_a_random_damage_is_refused_in_one_line_or_harmless(finished, tmp_path, seed):
    draw = random.Random(seed)
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    name = FILES[seed % len(FILES)]
    words = COMMANDS[1] if name == "bench.json" else draw.choice(COMMANDS)
    if words[0] == "train":
        (directory / "summary.json").unlink()
        name = "recipe.json"
    path = directory / name
    path.write_text(damaged(path.read_text("utf-8"), name.endswith("l"), draw), "utf-8")
    status, said = outcome(words, directory)
    assert status in (0, 2), (words, name, said)
    if status == 2:
        assert len([line for line in said if not line.startswith("measuring")]) == 1, said
        assert said[-1].startswith("Error: ") and "Traceback" not in said[-1]


@pytest.mark.parametrize(
    ("file", "place", "value", "words"),
    [
        ("recipe.json", ("precision",), math.nan, ("inspect",)),
        ("recipe.json", ("precision",), True, ("prune", "--threshold", "1.5")),
        ("recipe.json", ("data_dir",), ["data"], ("report",)),
        ("recipe.json", ("recipe", "kl_scale"), [1], ("inspect",)),
        ("summary.json", ("units", 0, "zeroed"), "x", ("report", "--no-sweep")),
        ("summary.json", ("error", "pruned"), [1.0], ("inspect",)),
        ("metrics.jsonl", (0, "units"), [], ("report", "--no-sweep")),
        ("pruned/network.json", ("input_shape",), {"x": 1}, ("bench",)),
        ("pruned/network.json", ("kwargs",), None, ("export", "--format", "pt2")),
        ("bench.json", (0, "threads"), None, ("report", "--no-sweep")),
    ],
)
def test_a_value_of_a_wrong_type_is_named(finished, tmp_path, file, place, value, words):
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    path, lines = directory / file, file.endswith("l")
    text = path.read_text("utf-8")
    values = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    values = replaced(values, place, value)
    path.write_text("\n".join(map(json.dumps, values)) if lines else json.dumps(values), "utf-8")
    status, said = outcome(words, directory)
    assert status == 2 and len(said) == 1, said
    assert "is damaged" in said[0] and str(place[-1]) in said[0]


def test_a_unit_without_zeroed_has_none(finished, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    path = directory / "summary.json"
    summary = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(replaced(summary, ("units", 0, "zeroed"), ...)), "utf-8")
    result = run("inspect", directory, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["gates"][0]["zeroed"] == 0


@pytest.mark.parametrize("words", [("inspect",), COMMANDS[2], ("train", "--resume")])
@pytest.mark.parametrize("kind", ["cut", "flip", "other"])
def test_a_damaged_checkpoint_is_refused_in_one_line(finished, stopped, tmp_path, words, kind):
    directory = tmp_path / "run"
    shutil.copytree(finished if words[0] == "prune" else stopped, directory)
    path = directory / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    if kind == "cut":
        del content[len(content) // 2 :]
    elif kind == "flip":  # of a bit in a tensor
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if kind == "other":
        torch.save(torch.zeros(2), path)
    status, said = outcome(words, directory)
    assert status == 2 and len(said) == 1, said
    assert said[0].startswith(f"Error: {path} is damaged: "), said
