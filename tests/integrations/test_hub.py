"""Pruned networks in folders for the Hugging Face Hub, without a network."""

import json
import re
import subprocess
import sys
import types

import pytest
import torch

import pyro_sbp as sbp
from pyro_sbp.gates.calling import call
from pyro_sbp.integrations import hub
from pyro_sbp.integrations.hub import from_pretrained, push_to_hub, save_pretrained
from pyro_sbp.networks import LeNet300_100

RESULTS = {"dense": {"error": 0.0123456, "MACs": 266_200}, "pruned": {"error": 0.0139}}


def cut(net, x, fraction=0.5, seed=0, only=""):
    """Remove a share of the units of every gate, or of those that are called so."""
    gates = [gate for gate in sbp.find_gates(net, x) if only in gate.name]
    generator = torch.Generator().manual_seed(seed)
    theta = {}
    for gate in gates:
        theta[gate.name] = 0.5 + torch.rand(gate.size, generator=generator)
        theta[gate.name][: int(gate.size * fraction)] = 0
    return sbp.shrink(net, gates, theta, x).eval()


@pytest.fixture
def small():
    torch.manual_seed(0)
    x = torch.rand(2, 1, 28, 28)
    return cut(LeNet300_100(), x), x


def test_a_folder_holds_the_network_and_its_card(small, tmp_path):
    net, x = small
    (tmp_path / "tokenizer.json").write_text("{}")
    save_pretrained(
        net, tmp_path, LeNet300_100, repo_id="me/lenet", results=RESULTS, license="mit",
        command="pyro-sbp train --arch lenet-300-100",
        units={"fc1": {"total": 300, "kept": list(range(150)), "zeroed": []}},
    )  # fmt: skip
    assert torch.equal(from_pretrained(tmp_path)(x), net(x))
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "pyro-sbp"\nlicense: "mit"\ntags: ')
    for line in (
        "|  | error | MACs |",
        "| dense | 0.01235 | 266200 |",
        "| pruned | 0.0139 |  |",
        "| `fc1` | 300 | 150 | 0 |",
        "pyro-sbp train --arch lenet-300-100",
    ):
        assert line in card.splitlines()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["constructor"] == "pyro_sbp.networks:LeNet300_100"
    assert config["num_parameters"] == sum(p.numel() for p in net.parameters())
    assert (tmp_path / "tokenizer.json").exists()
    # The code of the card loads it.
    (code,) = re.findall(r"```python\n(.+?)```", card, flags=re.S)
    space = {}
    exec(code.replace("'me/lenet'", repr(str(tmp_path))), space)
    assert torch.equal(space["net"](x), net(x))


def test_a_folder_is_replaced_only_on_request(small, tmp_path):
    net, x = small
    save_pretrained(net, tmp_path, LeNet300_100)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_pretrained(net, tmp_path, LeNet300_100)
    other = cut(LeNet300_100(), x, fraction=0.8)
    save_pretrained(other, tmp_path, LeNet300_100, overwrite=True)
    assert torch.equal(from_pretrained(tmp_path)(x), other(x))
    (tmp_path / "model" / "x").mkdir(parents=True)
    (tmp_path / "model" / "README.md").write_text("of the user")
    with pytest.raises(FileExistsError, match=r"README\.md"):
        save_pretrained(net, tmp_path / "model", LeNet300_100)


def test_requests_that_cannot_be_met(small, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="the constructor of LeNet300_100 is missing"):
        save_pretrained(small[0], tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="has no complete saved network"):
        push_to_hub(tmp_path, "me/net")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-sbp\[hub\]'"):
        from_pretrained("me/net")


def test_a_folder_is_pushed_as_it_is(small, tmp_path, monkeypatch):
    calls = {}

    class HfApi:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["made"] = (repo_id, options)

        def upload_folder(self, **options):
            calls["sent"] = options
            return types.SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(hub, "_hub", lambda: types.SimpleNamespace(HfApi=HfApi))
    save_pretrained(small[0], tmp_path, LeNet300_100)
    assert push_to_hub(tmp_path, "me/net", private=True, token="t") == "https://hub/commit"
    assert calls["token"] == "t"
    assert calls["made"] == ("me/net", {"private": True, "exist_ok": True})
    assert calls["sent"]["repo_id"] == "me/net" and calls["sent"]["folder_path"] == tmp_path


def test_a_repository_is_read_from_the_cache(small, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    net, x = small
    repository = tmp_path / "models--me--net"
    save_pretrained(net, repository / "snapshots" / ("0" * 40), LeNet300_100)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert torch.equal(from_pretrained("me/net", cache_dir=tmp_path)(x), net(x))
    with pytest.raises(ValueError, match="me/other is neither a folder nor a repository"):
        from_pretrained("me/other", cache_dir=tmp_path)


TINY = {"vocab_size": 50, "num_hidden_layers": 2, "intermediate_size": 48, "hidden_size": 32}


def bert(transformers):
    config = transformers.BertConfig(**TINY, num_attention_heads=4, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def llama(transformers):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "use_cache": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **heads))


def vit(timm):
    return timm.create_model("vit_tiny_patch16_224", **VIT)


VIT = {"img_size": 32, "depth": 2, "num_heads": 4, "embed_dim": 32, "num_classes": 5}

FRESH = """
import sys
sys.modules["pyro"] = None
import torch
from pyro_sbp.integrations.hub import from_pretrained
x, y = torch.load({file!r}, weights_only=True).values()
net = from_pretrained({folder!r})
with torch.no_grad():
    found = net(**x)[0] if isinstance(x, dict) else net(x)
assert torch.equal(found, y)
assert type(net).__name__ == {name!r}
assert not any(name.partition(".")[0] == "pyro" for name in sys.modules if sys.modules[name])
"""


def reloads_in_a_fresh_process(net, x, path):
    with torch.no_grad():
        y = call(net, x)
    file = path.with_suffix(".pt")
    torch.save({"x": x, "y": y if isinstance(y, torch.Tensor) else y[0]}, file)
    values = {"file": str(file), "folder": str(path), "name": type(net).__name__}
    subprocess.run([sys.executable, "-c", FRESH.format(**values)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "make"),
    [("transformers", bert), ("transformers", llama), ("timm", vit)],
    ids=["bert", "llama", "vit"],
)
@pytest.mark.filterwarnings("ignore")
def test_heads_that_are_cut_reload_in_a_fresh_process(library, make, tmp_path):
    torch.manual_seed(0)
    net = make(pytest.importorskip(library)).eval()
    x = {"input_ids": torch.randint(50, (2, 7))} if make is not vit else torch.rand(2, 3, 32, 32)
    small = cut(net, x, 0.25)
    if make is vit:
        name = "timm.models.vision_transformer:vit_tiny_patch16_224"
        save_pretrained(small, tmp_path / "net", name, VIT)
    else:
        save_pretrained(small, tmp_path / "net")
        config = json.loads((tmp_path / "net" / "config.json").read_text())
        assert config["architectures"] == [type(net).__name__]
        # As many heads cannot be written into it, it stays that of the model before.
        assert config["num_attention_heads"] == net.config.num_attention_heads
    reloads_in_a_fresh_process(small, x, tmp_path / "net")


@pytest.mark.slow
@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.filterwarnings("ignore")
def test_transformers_alone_loads_a_model_with_equal_layers(make, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = make(transformers).eval()
    x = {"input_ids": torch.randint(50, (2, 7))}
    # Neither heads nor a pooler of another width can be written into the configuration of BERT.
    small = cut(net, x, 0.5, only="intermediate" if make is bert else "")
    save_pretrained(small, tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["intermediate_size"] == 24
    if make is llama:
        assert config["num_attention_heads"] == 4 and config["num_key_value_heads"] == 2
    assert 'library_name: "transformers"' in (tmp_path / "net" / "README.md").read_text()
    plain = type(net).from_pretrained(tmp_path / "net").eval()
    with torch.no_grad():
        assert torch.equal(plain(**x)[0], small(**x)[0])
        assert torch.equal(from_pretrained(tmp_path / "net")(**x)[0], small(**x)[0])


@pytest.mark.slow
def test_a_file_names_no_other_attention(tmp_path):
    transformers = pytest.importorskip("transformers")
    net = bert(transformers).eval()
    save_pretrained(net, tmp_path)
    index = tmp_path / "network.json"
    content = json.loads(index.read_text())
    content["kwargs"]["attn_implementation"] = "someone/code"
    del content["checksums"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="attn_implementation is 'someone/code'"):
        from_pretrained(tmp_path)
