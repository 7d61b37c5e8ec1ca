"""The README's code does what it says."""

import re
from pathlib import Path

import pyro
import pytest
import torch

from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.deployment.loading import load
from pyro_sbp.pruning.macs import count_macs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"^```sh\n(.*?)^```", README, flags=re.M | re.S)
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()


def test_the_example_in_python(capsys):
    (code,) = BLOCKS
    space = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), space)
    x, y = load_dataset("digits", image_size=28).test.batch(slice(None))
    small, net = space["small"], space["net"]
    assert float((small(x).argmax(1) != y).float().mean()) < 0.1
    assert count_macs(net, x[:1]) > 2.5 * count_macs(small, x[:1])
    assert torch.equal(load("small")(x), small.eval()(x))
    assert "MACs" in capsys.readouterr().out


def test_it_is_short():
    assert len(README.splitlines()) <= 200


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
