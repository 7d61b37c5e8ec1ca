"""The README's code does what it says."""

import re
from pathlib import Path

import pyro
import pytest
import torch

from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.recipes.settings import read_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"^```sh\n(.*?)^```", README, flags=re.M | re.S)
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()


def block(word):
    (found,) = [text for text in BLOCKS if word in text]
    space = {"__name__": "readme"}
    exec(compile(found, "README.md", "exec"), space)
    return space


def test_prune_your_own_network():
    space = block("sbp.prune(")
    x, y = load_dataset("digits", image_size=28).test.batch(slice(None))
    assert space["result"].macs_ratio > 3
    assert float((space["small"](x).argmax(1) != y).float().mean()) < 0.1
    assert not space["small"].training  # as `load` gives it
    *_, fc1 = space["small"].fc1.modules()  # after its Select, if it has one
    assert space["features"].sum() == fc1.in_features
    assert torch.equal(space["same"](x), space["small"](x))
    assert space["low"].shape == (50,) and set(space["kept"]) == set(space["guide"].snr())


def test_the_distributions_in_your_own_model():
    space = block("TruncatedLogUniform(")
    assert (space["guide"].snr()["theta"] >= 1).tolist() == [True, False, True, False, False]
    assert space["samples"]["y"].shape == (100, 300)


def test_every_block_is_run_by_a_test():
    assert len(BLOCKS) == 2


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", README, flags=re.M)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    from pyro_sbp.cli import cli

    commands = re.findall(r"^pyro-sbp (\w+)", "".join(SHELL), flags=re.M)
    assert commands and set(commands) <= set(cli.commands)
    for option in set(re.findall(r"`--([a-z-]+)", README)):
        commands = cli.commands.values()
        assert any(f"--{option}" in p.opts for c in commands for p in c.params), option


def test_the_recipe_is_one(tmp_path):
    (text,) = re.findall(r"^```toml\n(.*?)^```", README, flags=re.M | re.S)
    (tmp_path / "mine.toml").write_text(text)
    assert read_recipe(tmp_path / "mine.toml").kl_scale == 4.0
