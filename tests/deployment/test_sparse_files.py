"""Files that leave out zeros."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.deployment.sparse_files import read_sparse, write_sparse
from pyro_sbp.networks import LeNet300_100


def sparse(shape, share, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype) * (torch.rand(shape) < share)


def test_what_is_written_is_read(tmp_path):
    tensors = {
        "sparse": sparse((300, 784), 0.001),
        "dense": sparse((20, 30), 1.0),
        "half": sparse((50, 20, 5, 5), 0.02, torch.bfloat16),
        "zeros": torch.zeros(7, 9),
        "far": torch.zeros(2000).index_fill(0, torch.tensor([0, 255, 511, 1999]), 3.0),
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(3),
    }
    write_sparse(tensors, tmp_path / "file")
    found = read_sparse(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert (tmp_path / "file").stat().st_size < 0.03 * 4 * 300 * 784 + 8_000


def test_a_network_loads_from_either_file(tmp_path):
    net = LeNet300_100().eval()
    with torch.no_grad():
        net.fc1.weight.mul_(torch.rand_like(net.fc1.weight) < 0.01)
    sbp.save(net, tmp_path / "net", LeNet300_100, sparse=True)
    x = torch.rand(2, 784)
    whole = sbp.load(tmp_path / "net")(x)
    (tmp_path / "net" / "model.safetensors").unlink()
    assert torch.equal(sbp.load(tmp_path / "net")(x), whole)
    (tmp_path / "net" / "sparse.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="has no complete saved network"):
        sbp.load(tmp_path / "net")


def test_a_damaged_file_is_refused(tmp_path):
    save_file(
        {"a:values": torch.ones(3), "a:steps": torch.tensor([1, 2], dtype=torch.uint8)},
        tmp_path / "file",
        metadata={"shapes": '{"a": [9]}'},
    )
    with pytest.raises(ValueError, match="'a' has positions that do not fit its values"):
        read_sparse(tmp_path / "file")
    save_file({"a": nn.Linear(1, 1).weight.detach()}, tmp_path / "file")
    with pytest.raises(ValueError, match="is not a file of sparse tensors"):
        read_sparse(tmp_path / "file")


ONES, STEPS = torch.ones(2), torch.tensor([1, 2], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("shapes", "content", "words"),
    [
        ('{"a": [9]}', {"a:values": ONES}, "the values or steps of 'a' are missing"),
        ('{"a": [9]}', {"a:steps": STEPS}, "the values or steps of 'a' are missing"),
        (
            '{"a": [2]}',
            {"a:values": ONES, "a:steps": STEPS},
            "'a' has positions that do not fit its values",
        ),
        # A step of 0 would be the last place, as an index of -1.
        (
            '{"a": [9]}',
            {"a:values": ONES, "a:steps": STEPS - 1},
            "'a' has positions that do not fit",
        ),
        (
            '{"a": [9]}',
            {"a:values": ONES, "a:steps": STEPS.long()},
            "'a' has positions that do not fit",
        ),
        (
            '{"a": [9]}',
            {"a:values": ONES[:, None], "a:steps": STEPS},
            "'a' has positions that do not fit",
        ),
        ('{"a": [-9]}', {}, "its shapes are not lists of sizes"),
        ('{"a": [true]}', {}, "its shapes are not lists of sizes"),
        ('{"a": [1.0]}', {}, "its shapes are not lists of sizes"),
        ('{"a": 9}', {}, "its shapes are not lists of sizes"),
        ("[]", {}, "its shapes are not lists of sizes"),
        ('{"a": [9], "a": [9]}', {}, "the key 'a' appears twice"),
        ("{", {}, "is not a file of sparse tensors"),
        ("[" * 10_000, {}, "it is nested too deeply"),
        (f'{{"a": [{2**60}]}}', {"a:values": ONES, "a:steps": STEPS}, "does not fit into memory"),
    ],
    ids=range(15),
)
def test_shapes_and_places_are_checked(shapes, content, words, tmp_path):
    save_file({"b": torch.ones(3), **content}, tmp_path / "file", metadata={"shapes": shapes})
    with pytest.raises(ValueError, match=words) as found:
        read_sparse(tmp_path / "file")
    assert str(tmp_path / "file") in str(found.value) and "\n" not in str(found.value)


def test_names_with_a_colon_are_kept(tmp_path):
    tensors = {"a": sparse((300, 300), 0.001), "a:b": torch.ones(3)}
    write_sparse(tensors, tmp_path / "file")
    assert read_sparse(tmp_path / "file").keys() == tensors.keys()
