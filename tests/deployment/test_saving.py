"""save and load: files without pickle, bit-equal outputs, no Pyro."""

import json
import subprocess
import sys

import pytest
import torch

import pyro_sbp as sbp


@pytest.fixture
def small():
    torch.manual_seed(0)
    net = sbp.networks.LeNet5()
    x = torch.rand(2, 1, 28, 28)
    gates = sbp.find_gates(net, x, ["fc1"])
    theta = {gate.name: torch.rand(gate.size) * (torch.rand(gate.size) > 0.6) for gate in gates}
    return sbp.shrink(net, gates, theta, x).eval(), x


def test_outputs_are_bit_equal(small, tmp_path):
    net, x = small
    sbp.save(net, tmp_path / "net", constructor=sbp.networks.LeNet5)
    assert torch.equal(sbp.load(tmp_path / "net")(x), net(x))


def test_batch_norm_buffers_come_along(tmp_path):
    torch.manual_seed(0)
    net = sbp.networks.VGGLike(num_classes=3)
    x = torch.rand(4, 3, 32, 32)
    net(x)
    gates = sbp.find_gates(net, x)
    theta = {gate.name: (torch.rand(gate.size) > 0.6).float() for gate in gates}
    small = sbp.shrink(net, gates, theta, x).eval()
    sbp.save(small, tmp_path / "net", sbp.networks.VGGLike, {"num_classes": 3})
    assert torch.equal(sbp.load(tmp_path / "net")(x), small(x))


def test_loading_needs_no_pyro(small, tmp_path):
    net, x = small
    sbp.save(net, tmp_path / "net", constructor=sbp.networks.LeNet5)
    torch.save({"x": x, "y": net(x).detach()}, tmp_path / "xy.pt")
    program = f"""
import sys
sys.modules["pyro"] = None
import torch, pyro_sbp
xy = torch.load({str(tmp_path / "xy.pt")!r}, weights_only=True)
net = pyro_sbp.load({str(tmp_path / "net")!r})
torch.testing.assert_close(net(xy["x"]), xy["y"], rtol=1e-5, atol=1e-6)  # with other threads
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_foreign_constructor_must_be_passed(small, tmp_path):
    net, x = small
    sbp.save(net, tmp_path / "net", constructor=sbp.networks.LeNet5)
    path = tmp_path / "net" / "network.json"
    network = json.loads(path.read_text())
    for name in (
        "os:system",
        "pyro_sbp.networks_evil:f",
        "torchvision.models.os:system.x",
        "torchvision.models._api:load_state_dict_from_url",
        "pyro_sbp.networks:nn",
    ):
        path.write_text(json.dumps({**network, "constructor": name}))
        with pytest.raises(ValueError, match="pass it as load"):
            sbp.load(tmp_path / "net")
    assert torch.equal(sbp.load(tmp_path / "net", sbp.networks.LeNet5)(x), net(x))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("network.json", None),
        ("model.safetensors", None),
        ("network.json", b"{"),
        ("model.safetensors", b"\0" * 20),
        ("network.json", b'{"format": 2, "constructor": "a:b", "kwargs": {}, "layers": {}}'),
    ],
)
def test_damaged_files_are_refused(small, tmp_path, file, content):
    sbp.save(small[0], tmp_path / "net", constructor=sbp.networks.LeNet5)
    if content is None:
        (tmp_path / "net" / file).unlink()
    else:
        (tmp_path / "net" / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"holds no whole saved network|reads format 1"):
        sbp.load(tmp_path / "net")


def test_the_directory_of_a_run_says_where_its_network_is(small, tmp_path):
    sbp.save(small[0], tmp_path / "pruned", constructor=sbp.networks.LeNet5)
    with pytest.raises(ValueError, match=r"is a run; its network is in .*pruned"):
        sbp.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"conv1": {"out_channels": "many"}},
        {"conv1": {"forward": 3}},
        {"conv9": {"out_channels": 3}},
        {},
    ],
)
def test_tampered_layers_are_refused(small, tmp_path, change):
    sbp.save(small[0], tmp_path / "net", constructor=sbp.networks.LeNet5)
    path = tmp_path / "net" / "network.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers": change}))
    with pytest.raises(ValueError, match="does not fit"):
        sbp.load(tmp_path / "net")


def test_a_saved_network_gives_way_if_it_is_told_to(small, tmp_path):
    net, *_ = small
    for _ in range(2):
        sbp.save(net, tmp_path / "net", constructor=sbp.networks.LeNet5, overwrite=True)
    (tmp_path / "net" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files"):
        sbp.save(net, tmp_path / "net", constructor=sbp.networks.LeNet5, overwrite=True)


def test_nothing_is_written_over(small, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        sbp.save(small[0], tmp_path, constructor=sbp.networks.LeNet5)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_wrong_constructor_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match="builds a"):
        sbp.save(small[0], tmp_path / "net", constructor=sbp.networks.LeNet500_300)
    assert not (tmp_path / "net").exists()


def test_removed_heads_and_groups_are_saved(tmp_path):
    torch.manual_seed(0)
    kwargs = {"d_model": 12, "nhead": 3, "dim_feedforward": 20, "batch_first": True}
    net, x = (
        sbp.separate_attention(torch.nn.TransformerEncoderLayer(**kwargs)),
        torch.rand(2, 4, 12),
    )
    gates = sbp.find_gates(net, x)
    theta = {gate.name: (torch.rand(gate.size) > 0.4).float() for gate in gates}
    theta["self_attn.query"] = torch.tensor([1.0, 0.0, 0.5])
    small = sbp.shrink(net, gates, theta, x).eval()
    make = torch.nn.TransformerEncoderLayer
    sbp.save(small, tmp_path / "net", constructor=make, kwargs=kwargs)
    loaded = sbp.load(tmp_path / "net", constructor=make)
    assert torch.equal(loaded(x), small(x)) and loaded.self_attn.query.out_features == 8


def grouped():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 1),
        torch.nn.Conv2d(8, 8, 3, groups=4),
        torch.nn.ConvTranspose2d(8, 6, 2),
        torch.nn.PReLU(6),
        torch.nn.Conv2d(6, 2, 1),
    )


def test_grouped_and_transposed_convolutions_are_saved(tmp_path):
    net, x = grouped(), torch.rand(2, 3, 6, 6)
    gates = sbp.find_gates(net, x)
    theta = {gate.name: torch.ones(gate.size) for gate in gates}
    theta["0"][2:4] = theta["1"][2:4] = theta["2"][:3] = 0
    small = sbp.shrink(net, gates, theta, x).eval()
    assert (small[1].groups, small[2].in_channels, small[3].num_parameters) == (3, 6, 3)
    sbp.save(small, tmp_path / "net", constructor=grouped)
    assert torch.equal(sbp.load(tmp_path / "net", constructor=grouped)(x), small(x))


def tied():
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    net[1].weight = net[0].weight
    return net


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    net, x = tied().eval(), torch.rand(2, 4)
    sbp.save(net, tmp_path / "net", constructor=tied)
    loaded = sbp.load(tmp_path / "net", constructor=tied)
    assert torch.equal(loaded(x), net(x)) and loaded[1].weight is loaded[0].weight
    with pytest.raises(TypeError):
        sbp.save(net, tmp_path / "other", constructor=tied, units={"a": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
