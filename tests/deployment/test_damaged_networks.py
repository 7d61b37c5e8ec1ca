"""Damaged files of saved networks: the same network, or one line that says what is wrong."""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.deployment import rebuilding, sparse_files

#: How many random damages of each kind of file; PYRO_SBP_DAMAGES=2000 for a long search.
DAMAGES = int(os.environ.get("PYRO_SBP_DAMAGES", "60"))
DEEP = "[" * 100_000
WRONG = [
    None, True, False, -1, 0, 1.5, 3, 2**31, 2**40, 10**30, float("nan"), float("inf"), "", "x",
    "a\nb", [], [[]], [[[[3]]]], {}, {"a": 1}, {"": None}, [None], "forward", "fc1.weight",
]  # fmt: skip


class Net(nn.Module):
    """A network with a part of every kind that a file describes."""

    def __init__(self, classes=3, width=6):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.fc1 = nn.Linear(width * 36, 12)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc2 = nn.Linear(12, classes)
        self.scale = nn.LayerNorm(classes)
        self.tied = nn.ModuleList([nn.Linear(classes, classes) for _ in range(2)])
        self.tied[1].weight = self.tied[0].weight

    def forward(self, x):
        x = self.fc1(self.depthwise(self.norm(self.conv(x)).relu()).flatten(1))
        x = x.unflatten(1, (3, 4))
        x = self.scale(self.fc2(self.attention(x, x, x)[0].flatten(1)))
        return self.tied[1](self.tied[0](x).tanh())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved network, one as earlier versions wrote it, and what they compute."""
    torch.manual_seed(0)
    net, x = sbp.separate_attention(Net()).eval(), 3 * torch.randn(4, 1, 8, 8)
    gates = sbp.find_gates(net, x, ["fc1"])
    theta = {gate.name: torch.ones(gate.size) for gate in gates}
    theta["conv"][1] = theta["fc1_input"][::5] = theta["attention.query"][0] = 0
    small = sbp.shrink(net, gates, theta, x)
    small.fc2.bias.requires_grad_(False)
    with torch.no_grad():
        small.fc1.layer.weight *= torch.rand_like(small.fc1.layer.weight) < 0.2
    directory = tmp_path_factory.mktemp("saved")
    assert small(x).std(0).min() > 1e-3
    units = {"conv": {"total": 6, "kept": [0], "zeroed": []}}
    sbp.save(small, directory / "new", Net, {"classes": 3}, units, (1, 8, 8), sparse=True)
    shutil.copytree(directory / "new", directory / "old")
    strip(directory / "old")
    return directory, x, small(x)


def strip(directory):
    """Make a saved network what earlier versions wrote: without checksums."""
    path = directory / "network.json"
    network = json.loads(path.read_text())
    del network["checksums"], network["frozen"]
    path.write_text(json.dumps(network, indent=2) + "\n")


def places(value, path=()):
    """The paths to all values in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def damage_json(text, chance):
    """Other JSON, or what is hardly JSON."""
    kind = chance.choice(["value", "value", "value", "key", "rename", "twice", "deep", "literal"])
    value = json.loads(text)
    *path, last = chance.choice([place for place in places(value) if place])
    inner = value
    for key in path:
        inner = inner[key]
    if kind == "value":
        inner[last] = chance.choice(WRONG)
    elif kind == "key" or isinstance(inner, list):
        del inner[last]
    elif kind == "rename":
        inner[chance.choice(["", "x", "conv", "select", "groups", "fc1"])] = inner.pop(last)
    elif kind == "twice":
        return text.replace("{", '{"kwargs": {}, "kwargs": {"classes": 9}, ', 1)
    else:
        inner[last] = "PLACE"
        text = DEEP if kind == "deep" else chance.choice(["NaN", "-Infinity", "9" * 5000, "1e999"])
        return json.dumps(value).replace('"PLACE"', text)
    return json.dumps(value)


def damage(directory, chance):
    """Damage a saved network, and say how."""
    kind = chance.choice(
        ["json"] * 4 + ["bits"] * 3 + ["cut", "bytes", "swap", "missing", "longer"]
    )
    path = chance.choice(sorted(directory.iterdir()))
    content = bytearray(path.read_bytes())
    if kind == "json":
        path = directory / "network.json"
        content = damage_json(path.read_text(), chance).encode()
    elif kind == "bits":
        for _ in range(chance.choice([1, 1, 5])):
            # Half of them in the header of a file of tensors.
            place = chance.randrange(
                len(content) if chance.random() < 0.5 else min(2000, len(content))
            )
            content[place] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del content[chance.randrange(len(content)) :]
    elif kind == "bytes":
        place = chance.randrange(len(content))
        content[place : place + 8] = chance.randbytes(8)
    elif kind == "longer":
        content += chance.choice([b"\0", b"{}", b"\n", chance.randbytes(50)])
    elif kind == "swap":
        other = chance.choice(sorted(directory.iterdir()))
        content = bytearray(other.read_bytes())
        other.write_bytes(path.read_bytes())
    path.unlink()
    if kind != "missing":
        path.write_bytes(content)
    elif chance.random() < 0.3:
        path.mkdir()
    return kind, path.name


def loaded(directory):
    """The network in a directory, or None if it is refused in one line."""
    try:
        return sbp.load(directory, Net)
    except ValueError as error:
        assert str(directory) in str(error) and len(str(error).splitlines()) == 1, error
        return None


@pytest.mark.parametrize("version", ["new", "old"])
def test_a_damaged_network_is_refused_or_unchanged(saved, version, tmp_path):
    directory, x, expected = saved
    chance = random.Random(0)
    refused = 0
    for number in range(DAMAGES):
        copy = tmp_path / str(number)
        shutil.copytree(directory / version, copy)
        how = damage(copy, chance)
        if chance.random() < 0.3 and (copy / "model.safetensors").is_file():
            (copy / "model.safetensors").unlink()
        net = loaded(copy)
        refused += net is None
        # Without a checksum, nothing tells that a weight has changed.
        if net is not None and (version == "new" or how[0] == "json"):
            assert torch.equal(net(x), expected), how
        shutil.rmtree(copy)
    assert refused > 0.4 * DAMAGES


@pytest.mark.parametrize("file", ["model.safetensors", "sparse.safetensors", "units.json"])
def test_a_flipped_bit_is_named(saved, file, tmp_path):
    shutil.copytree(saved[0] / "new", tmp_path / "net")
    path = tmp_path / "net" / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    words = f"net has no complete saved network: {file} is damaged: it differs from its checksum"
    with pytest.raises(ValueError, match=words):
        sbp.load(tmp_path / "net", Net)
    if file != "model.safetensors":
        path.unlink()
        assert loaded(tmp_path / "net") is not None


def test_a_network_without_checksums_loads_as_before(saved):
    directory, x, expected = saved
    net = sbp.load(directory / "old", Net)
    assert torch.equal(net(x), expected) and all(p.requires_grad for p in net.parameters())


def with_tensors(directory, target, change):
    """A copy of a saved network with other tensors."""
    shutil.copytree(directory / "old", target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("fc1.select.index", lambda t: t + 150, "selects features that are not among its 216"),
        ("fc1.select.index", lambda t: t - 9, "selects features that are not among its 216"),
        (
            "fc1.select.index",
            lambda t: t[:-1],
            "selects 143 features, but has no valid index for them",
        ),
        (
            "fc1.select.index",
            torch.Tensor.float,
            "selects 143 features, but has no valid index for them",
        ),
        ("conv.weight", lambda t: t[:4], "'conv.weight' has shape .4, 1, 3, 3., not .5, 1, 3, 3."),
        ("norm.bias", lambda t: t.repeat(2), "'norm.bias' has shape .10., not .5."),
        ("scale.weight", lambda t: t[:2], "'scale.weight' has shape .2., not .3."),
        ("fc2.bias", torch.Tensor.int, "'fc2.bias' has the type torch.int32, not torch.float32"),
    ],
)
def test_tensors_have_to_fit_the_layers(saved, name, change, words, tmp_path):
    def damaged(state):
        state[name] = change(state[name]).contiguous()

    directory = with_tensors(saved[0], tmp_path / "net", damaged)
    with pytest.raises(ValueError, match=f"does not fit test_damaged_networks:Net: .*{words}"):
        sbp.load(directory, Net)


def test_too_few_and_too_many_tensors_are_named(saved, tmp_path):
    few = with_tensors(saved[0], tmp_path / "few", lambda state: state.pop("fc2.weight"))
    with pytest.raises(ValueError, match=r"the tensor 'fc2\.weight' is missing"):
        sbp.load(few, Net)
    many = with_tensors(saved[0], tmp_path / "many", lambda state: state.update(a=torch.ones(2)))
    with pytest.raises(ValueError, match="the tensor 'a' belongs to no layer"):
        sbp.load(many, Net)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"classes": 3', '"classes": 4', "'fc2.bias' has shape .3., not .4."),
        ('"classes": 3', '"classes": 1099511627776', "a tensor that does not fit into memory"),
        ('"classes": 3', '"classes": 3, "classes": 3', "the key 'classes' appears twice"),
        ('"kwargs": {', '"kwargs": {"a": {', "is damaged"),
        ('"classes": 3', '"classes": DEEP', "it is nested too deeply"),
        ('"groups": 5', '"groups": 0', "cannot be divided into 0 groups"),
        ('"groups": 5', '"groups": 2', "cannot be divided into 2 groups"),
        ('"groups": 5', '"groups": true', "is True; expected an integer of 0 or more"),
        ('"groups": 5', '"padding": 5', "sets 'padding', which no layer has"),
        ('"select": 143', '"select": 1099511627776', "but has no valid index for them"),
        ('"num_features": 5', '"groups": 5', "layer 'norm' has no groups"),
        ('"tied.0.weight"', '"tied.2.weight"', "cannot be the same tensor as 'tied.2.weight'"),
        ('"tied.1.weight"', '"tied.0.weight"', "'tied.0.weight' cannot be the same tensor"),
        ('"separate_attention": true', '"separate_attention": false', "no layer 'attention.query'"),
        ('"separate_attention": true', '"separate_attention": 1', "is 1; expected true or false"),
        ('"test_damaged_networks:Net"', '"a\\nb"', "expected a name of a callable"),
        ('"format": 1', '"format": true', "format is True; expected an integer"),
        (
            '"format": 1',
            '"format": 9',
            "net has format 9; this version of pyro-sbp reads formats 1 and 2",
        ),
        ('"format": 1,', "", "'format' is missing"),
    ],
)
def test_values_have_to_be_of_their_type_and_range(saved, old, new, words, tmp_path):
    shutil.copytree(saved[0] / "old", tmp_path / "net")
    path = tmp_path / "net" / "network.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new.replace("DEEP", DEEP), 1))
    with pytest.raises(ValueError, match=words) as found:
        sbp.load(tmp_path / "net", Net)
    assert len(str(found.value).splitlines()) == 1


def test_memory_is_looked_at_before_it_is_taken(saved, monkeypatch, tmp_path):
    """Damaged arguments and shapes must not get the process killed for its use of memory."""
    monkeypatch.setattr(rebuilding, "available_memory", lambda device: 2**20)
    shutil.copytree(saved[0] / "old", tmp_path / "net")
    path = tmp_path / "net" / "network.json"
    path.write_text(path.read_text().replace('"classes": 3', '"classes": 3, "width": 100000'))
    with pytest.raises(ValueError, match="a tensor that does not fit into memory"):
        sbp.load(tmp_path / "net", Net)
    monkeypatch.setattr(sparse_files, "available_memory", lambda device: 2**20)
    (tmp_path / "net" / "model.safetensors").unlink()
    path = tmp_path / "net" / "sparse.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[12, 143]", b"[9999999]"[:9]))
    with pytest.raises(ValueError, match="which does not fit into memory"):
        sbp.load(tmp_path / "net", Net)


def test_nothing_is_downloaded_for_a_file(tmp_path):
    """Arguments that make torchvision fetch weights are not taken from a file."""
    net = sbp.networks.LeNet5()
    sbp.save(net, tmp_path / "net", sbp.networks.LeNet5)
    strip(tmp_path / "net")
    path = tmp_path / "net" / "network.json"
    text = path.read_text().replace(
        "pyro_sbp.networks:LeNet5", "torchvision.models.resnet:resnet18"
    )
    for argument in ("weights", "pretrained"):
        path.write_text(text.replace('"kwargs": {}', f'"kwargs": {{"{argument}": true}}'))
        with pytest.raises(ValueError, match="pass it as load"):
            sbp.load(tmp_path / "net")
