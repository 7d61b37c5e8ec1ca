"""save and load: files without pickle, bit-equal outputs, no Pyro, and no instant without them."""

import functools
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

import pyro_sbp as sbp
from pyro_sbp.deployment import loading, saving


@pytest.fixture
def small():
    torch.manual_seed(0)
    net = sbp.networks.LeNet5()
    x = torch.rand(2, 1, 28, 28)
    gates = sbp.find_gates(net, x, ["fc1"])
    theta = {gate.name: torch.rand(gate.size) * (torch.rand(gate.size) > 0.6) for gate in gates}
    return sbp.shrink(net, gates, theta, x).eval(), x


def edit(directory, **values):
    """Change values of a saved network, and leave out the checksums that would tell."""
    path = directory / "network.json"
    network = {**json.loads(path.read_text()), **values}
    network.pop("checksums", None)
    path.write_text(json.dumps(network))


def strip(directory):
    """Make a saved network what earlier versions wrote: without checksums and frozen parameters."""
    edit(directory)
    path = directory / "network.json"
    network = json.loads(path.read_text())
    del network["frozen"]
    path.write_text(json.dumps(network))


def test_outputs_are_bit_equal(small, tmp_path):
    net, x = small
    sbp.save(net, tmp_path / "net", constructor=sbp.networks.LeNet5)
    assert torch.equal(sbp.load(tmp_path / "net")(x), net(x))


def test_batch_norm_buffers_come_along(tmp_path):
    torch.manual_seed(0)
    size = {"num_classes": 3, "width": 8}
    net = sbp.networks.VGGLike(**size)
    x = torch.rand(4, 3, 32, 32)
    net(x)
    gates = sbp.find_gates(net, x)
    theta = {gate.name: (torch.rand(gate.size) > 0.6).float() for gate in gates}
    small = sbp.shrink(net, gates, theta, x).eval()
    sbp.save(small, tmp_path / "net", sbp.networks.VGGLike, size)
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
    for name in (
        "os:system",
        "pyro_sbp.networks_evil:f",
        "torchvision.models.os:system.x",
        "torchvision.models._api:load_state_dict_from_url",
        "pyro_sbp.networks:nn",
    ):
        edit(tmp_path / "net", constructor=name)
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
        ("network.json", b'{"format": 3, "constructor": "a:b", "kwargs": {}, "layers": {}}'),
    ],
)
def test_damaged_files_are_refused(small, tmp_path, file, content):
    sbp.save(small[0], tmp_path / "net", constructor=sbp.networks.LeNet5)
    if content is None:
        (tmp_path / "net" / file).unlink()
    else:
        (tmp_path / "net" / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"has no complete saved network|reads formats 1 and 2"):
        sbp.load(tmp_path / "net")


def test_the_directory_of_a_run_says_where_its_network_is(small, tmp_path):
    sbp.save(small[0], tmp_path / "pruned", constructor=sbp.networks.LeNet5)
    with pytest.raises(ValueError, match=r"is a run directory; its network is in .*pruned"):
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
    edit(tmp_path / "net", layers=change)
    with pytest.raises(ValueError, match=r"does not fit|has no complete saved network"):
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


def test_loading_with_another_constructor_names_both(small, tmp_path):
    sbp.save(small[0], tmp_path / "net", constructor=sbp.networks.LeNet5)
    other = functools.partial(torch.nn.Linear, 3, 2)
    saved = r"net was saved from pyro_sbp.networks:LeNet5 and does not fit"
    with pytest.raises(ValueError, match=f"{saved} test_saving:linear: "):
        sbp.load(tmp_path / "net", linear)
    with pytest.raises(ValueError, match=f"{saved} functools:partial: "):
        sbp.load(tmp_path / "net", other)


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


class AttentionAndNorm(torch.nn.Module):
    """A number of heads and a group norm, which both follow a cut."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.calls = 3, 4, 5
        self.qkv, self.proj = torch.nn.Linear(12, 36), torch.nn.Linear(12, 12)
        self.norm, self.head = torch.nn.GroupNorm(3, 12), torch.nn.Linear(12, 2)

    def forward(self, x):
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        heads = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(self.norm(self.proj(heads).mT).mT)


def test_numbers_of_heads_and_groups_are_saved(tmp_path):
    torch.manual_seed(0)
    net, x = AttentionAndNorm().eval(), torch.randn(2, 5, 12)
    gates = sbp.find_gates(net, x)
    assert {gate.name: gate.size for gate in gates} == {"qkv": 3, "proj": 3}
    theta = {gate.name: torch.tensor([1.0, 0.0, 0.5]) for gate in gates}
    small = sbp.shrink(net, gates, theta, x)
    small.calls = 4  # no size of any layer
    assert (small.num_heads, small.norm.num_groups, small.norm.num_channels) == (2, 2, 8)
    sbp.save(small, tmp_path / "net", AttentionAndNorm)
    loaded = sbp.load(tmp_path / "net", AttentionAndNorm)
    assert torch.equal(loaded(x), small(x))
    assert (loaded.num_heads, loaded.head_dim, loaded.norm.num_groups) == (2, 4, 2)
    assert loaded.calls == 5
    edit(tmp_path / "net", sizes={"": {"num_heads": 30}})
    with pytest.raises(ValueError, match="'num_heads' of '' is 30, which does not follow"):
        sbp.load(tmp_path / "net", AttentionAndNorm)


def tied():
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    net[1].weight = net[0].weight
    return net


class WithMethod(sbp.networks.LeNet5):
    """A network that has a method of a name that some layers give to one of their sizes."""

    def num_parameters(self):
        return 1


def test_a_method_is_not_taken_for_a_size(small, tmp_path):
    net, x = small
    net.__class__ = WithMethod
    sbp.save(net, tmp_path / "net", constructor=WithMethod)
    assert torch.equal(sbp.load(tmp_path / "net", constructor=WithMethod)(x), net(x))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    net, x = tied().eval(), torch.rand(2, 4)
    sbp.save(net, tmp_path / "net", constructor=tied)
    loaded = sbp.load(tmp_path / "net", constructor=tied)
    assert torch.equal(loaded(x), net(x)) and loaded[1].weight is loaded[0].weight
    with pytest.raises(ValueError, match="the units of 'a' are <object "):
        sbp.save(net, tmp_path / "other", constructor=tied, units={"a": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_what_was_tied_after_construction_or_untied_stays_so(tmp_path):
    def plain():
        return torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))

    x = torch.rand(2, 4)
    sbp.save(tied(), tmp_path / "tied", constructor=tied)
    loaded = sbp.load(tmp_path / "tied", constructor=plain)
    assert loaded[1].weight is loaded[0].weight and loaded[1].weight is not loaded[2].weight
    net = plain().eval()
    sbp.save(net, tmp_path / "untied", constructor=plain)
    loaded = sbp.load(tmp_path / "untied", constructor=tied)
    assert torch.equal(loaded(x), net(x)) and loaded[1].weight is not loaded[0].weight


def test_tied_weights_of_another_type_stay_tied(tmp_path):
    net = tied().double().eval()
    sbp.save(net, tmp_path / "net", constructor=tied)
    loaded = sbp.load(tmp_path / "net", constructor=tied)
    assert loaded[0].weight.dtype == torch.float64 and loaded[1].weight is loaded[0].weight
    x = torch.rand(2, 4, dtype=torch.float64)
    assert torch.equal(loaded(x), net(x))


def frozen_in_part():
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    net[0].requires_grad_(False)
    return net


def test_frozen_parameters_stay_frozen(tmp_path):
    net, x = frozen_in_part(), torch.rand(3, 4)
    net[2].bias.requires_grad_(False)
    net[0].bias.requires_grad_(True)
    gates = sbp.find_gates(net, x)
    small = sbp.shrink(net, gates, {"0": torch.tensor([1.0, 0, 1, 0, 1, 1])}, x)
    sbp.save(small, tmp_path / "net", constructor=frozen_in_part)
    loaded = sbp.load(tmp_path / "net", constructor=frozen_in_part)
    expected = {"0.weight": False, "0.bias": True, "2.weight": True, "2.bias": False}
    assert {n: p.requires_grad for n, p in small.named_parameters()} == expected
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == expected
    # Files from before do not say which: the constructor decides.
    strip(tmp_path / "net")
    loaded = sbp.load(tmp_path / "net", constructor=frozen_in_part)
    assert [p.requires_grad for p in loaded.parameters()] == [False, False, True, True]
    edit(tmp_path / "net", frozen=["1.weight"])
    with pytest.raises(ValueError, match=r"'1\.weight' is frozen, but is not a parameter"):
        sbp.load(tmp_path / "net", constructor=frozen_in_part)


class Buffered(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.zeros(3), persistent=False)
        self.register_buffer("scale", torch.ones(3), persistent=False)
        self.table = torch.nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x):
        return x * self.scale + self.offset + self.table


def test_buffers_outside_the_state_dict_and_types_are_kept(tmp_path):
    net = Buffered().eval()
    net.offset += 2.5
    sbp.save(net, tmp_path / "net", constructor=Buffered)
    assert json.loads((tmp_path / "net" / "network.json").read_text())["buffers"] == ["offset"]
    loaded, x = sbp.load(tmp_path / "net", constructor=Buffered), torch.rand(2, 3)
    assert torch.equal(loaded(x), net(x)) and loaded.state_dict().keys() == {"table"}
    net.double()
    sbp.save(net, tmp_path / "net", constructor=Buffered, overwrite=True)
    loaded = sbp.load(tmp_path / "net", constructor=Buffered)
    assert loaded.scale.dtype == torch.float64 and loaded(x.double()).dtype == torch.float64


class WithExtraState(torch.nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


def complex_bias():
    net = torch.nn.Linear(2, 2)
    net.bias = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex128))
    return net


def overlapping():
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(2, 2))
    net[1].weight = torch.nn.Parameter(net[0].weight.detach()[:2])
    return net


def linear():
    return torch.nn.Sequential(torch.nn.Linear(2, 2))


def too_wide():
    net = linear()
    net[0].weight = torch.nn.Parameter(torch.zeros(3, 2))
    return net


@pytest.mark.parametrize(
    ("net", "constructor", "words"),
    [
        (WithExtraState(2, 2), lambda: WithExtraState(2, 2), "'_extra_state' of the state dict is"),
        (complex_bias(), complex_bias, "safetensors cannot store this network"),
        (overlapping(), overlapping, "safetensors cannot store this network"),
        (linear().append(torch.nn.Softmax(-1)), linear, "builds no Softmax at '1'"),
        (too_wide(), linear, r"'0\.weight' has shape \[3, 2\], not \[2, 2\]"),
    ],
    ids=["extra state", "complex", "overlapping", "more layers", "sizes"],
)
def test_what_could_not_be_loaded_is_not_saved(net, constructor, words, tmp_path):
    with pytest.raises(ValueError, match=words) as found:
        sbp.save(net, tmp_path / "net", constructor=constructor)
    assert list(tmp_path.iterdir()) == [] and len(str(found.value).splitlines()) == 1


def value_of(directory):
    """The value that `constant` was given, or None where there is no network."""
    return sbp.load(directory, constant).bias.item() if directory.exists() else None


def constant(value=0.0):
    net = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(net.bias, value)
    return net


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "save_file", "write_sparse"])
@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_whatever_fails_the_old_or_the_new_network_is_whole(
    function, error, after, tmp_path, monkeypatch
):
    """The calls of a function fail one after the other, before or after they do their work."""
    files = {*saving.FILES} - {"config.json"}  # that is only for models of transformers
    owner, name = (os, function[3:]) if "." in function else (saving, function)
    real, found, path = getattr(owner, name), [], tmp_path / "net"
    while len(found) < 20:
        sbp.save(constant(1.0), path, constant, sparse=True, units={}, overwrite=True)
        calls, failing = itertools.count(), len(found)

        def fails(*args, calls=calls, failing=failing):
            this = next(calls) == failing
            if after or not this:
                real(*args)
            if this:
                raise error

        monkeypatch.setattr(owner, name, fails)
        try:
            sbp.save(constant(2.0), path, constant, overwrite=True, sparse=True)
            break
        except (OSError, KeyboardInterrupt) as raised:
            assert isinstance(raised, KeyboardInterrupt) or f"cannot write {path}" in str(raised)
        finally:
            monkeypatch.setattr(owner, name, real)
        found.append(value_of(path))
        if found[-1] == 1.0:
            assert {file.name for file in path.iterdir()} == files
        with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write"):
            patch.setattr(saving, "save_file", full_disk)
            sbp.save(constant(3.0), path, constant, overwrite=True)
        assert value_of(path) == found[-1]
    assert value_of(path) == 2.0 and 0 < len(found) < 20
    assert {file.name for file in path.iterdir()} == files - {"units.json"}
    assert found == sorted(found) and set(found) <= {1.0, 2.0}
    assert [file.name for file in tmp_path.iterdir()] == ["net"]


def full_disk(tensors, path, metadata=None):
    path.write_bytes(b"some")
    raise OSError("no space left on device")


KILLED = """
import itertools, os, pathlib, shutil, signal, sys
import torch
import pyro_sbp as sbp
from test_saving import constant, strip, value_of

def killed(path, count):
    child = os.fork()
    if child == 0:
        left = itertools.count(1)

        def dying(function):
            def call(*args, **kwargs):
                if next(left) == count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call

        for name in ("replace", "fsync", "unlink", "mkdir", "open"):
            setattr(os, name, dying(getattr(os, name)))
        sbp.save(constant(2.0), path, constant, overwrite=True, sparse=True)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0

for old in ("with checksums", "without", "none"):
    found, leftovers = [], 0
    for count in itertools.count(1):
        root = pathlib.Path(sys.argv[1], f"{old} {count}")
        path = root / "net"
        root.mkdir()
        if old != "none":
            sbp.save(constant(1.0), path, constant, units={})
            if old == "without":
                strip(path)
        alive = not killed(path, count)
        found.append(value_of(path))
        before, names = found[-1], {file.name for file in root.rglob("*.part")}
        leftovers += bool(names)
        # A later save that fails loses nothing either; one that succeeds clears up.
        try:
            sbp.save(constant(3.0), path, constant, overwrite=True, units={"a": object()})
        except ValueError:
            assert value_of(path) == before
        sbp.save(constant(3.0), path, constant, overwrite=True)
        assert value_of(path) == 3.0
        assert {file.name for file in path.iterdir()} == {"model.safetensors", "network.json"}
        beside = [file.name for file in root.iterdir() if file.name != "net"]
        assert len(beside) <= (old == "none"), beside
        assert all(name.startswith("net.") and name.endswith(".part") for name in beside)
        if alive:
            break
    first = None if old == "none" else 1.0
    changed = found.index(2.0)
    assert 0 < changed and leftovers, (found, leftovers)
    assert found == [first] * changed + [2.0] * (len(found) - changed), found
    print(old, found, leftovers)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_instant_the_old_or_the_new_network_is_whole(tmp_path):
    program = KILLED
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, tmp_path],
        env=environment, capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_loading_while_another_process_saves_gives_the_new_network(tmp_path, monkeypatch):
    path, read = tmp_path / "net", loading._read_files
    sbp.save(constant(1.0), path, constant)

    def late(*args):
        monkeypatch.setattr(loading, "_read_files", read)
        sbp.save(constant(2.0), path, constant, overwrite=True)
        return read(*args)

    monkeypatch.setattr(loading, "_read_files", late)
    assert value_of(path) == 2.0


def test_a_directory_that_save_did_not_write_is_left_alone(tmp_path):
    other = tmp_path / "net.part"
    other.mkdir()
    (other / "notes").write_text("mine")
    sbp.save(constant(1.0), tmp_path / "net", constant)
    assert (other / "notes").read_text() == "mine" and value_of(tmp_path / "net") == 1.0
    assert {file.name for file in tmp_path.iterdir()} == {"net", "net.part"}


def complex_scale():
    net = torch.nn.Linear(1, 1)
    net.register_parameter("scale", torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    return net


def test_a_complex_parameter_stays_trainable(tmp_path):
    sbp.save(complex_scale(), tmp_path / "net", complex_scale)
    assert sbp.load(tmp_path / "net", complex_scale).scale.requires_grad
