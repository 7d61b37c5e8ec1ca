"""Latency and ONNX programs of the networks in a record of MiniLM, without training them again.

    python -m pyro_sbp.experiments.minilm_speed --model MODEL --seed 0

Latency depends on the shapes of a network, not on the values of its weights. Each network of the
record is therefore built from the pretrained weights: it keeps the heads that the record names, and
as many MLP units as the record counts. Each one is saved, loaded in a new process without Pyro,
exported to ONNX with dynamic batch and length, and measured in turn with the dense network. The
results go into `experiments/results/minilm/speed.json`, from which `pyro_sbp.experiments.tables`
makes a table of docs/pretrained_transformer.md.

Needs transformers, ONNX and ONNX Runtime: ``pip install 'pyro-sbp[transformers,export]'``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.minilm import RESULTS
from pyro_sbp.experiments.minilm_network import build, description, example, pretrained
from pyro_sbp.gates.gate import Gate
from pyro_sbp.pruning.exactness import checked_shrink
from pyro_sbp.training.files import write_json
from pyro_sbp.training.job import machine, versions

__all__ = ["export_program", "main", "of_shape"]

#: Batch size and length of the inputs at which an ONNX program is compared with its network.
SHAPES = ((1, 9), (5, 40))

#: Loads a network with transformers and torch alone, and writes its logits at every shape.
RELOAD = """
import sys
import torch
from transformers import BertConfig, BertForSequenceClassification
import pyro_sbp

class Classifier(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input_ids, attention_mask):
        return self.net(input_ids=input_ids, attention_mask=attention_mask).logits

def build(config):
    return Classifier(BertForSequenceClassification(BertConfig(**config)))

# Another number of threads sums in another order.
torch.set_num_threads(int(sys.argv[4]))
net = pyro_sbp.load(sys.argv[1], constructor=build).eval()
with torch.no_grad():
    outputs = [net(**inputs) for inputs in torch.load(sys.argv[2], weights_only=True)]
torch.save(outputs, sys.argv[3])
assert "pyro" not in sys.modules
"""


def of_shape(
    net: nn.Module, gates: Sequence[Gate], heads: Sequence[Sequence[int]], units: Sequence[int]
) -> nn.Module:
    """A smaller network with the shapes of a recorded one.

    Args:
        net: the dense network.
        gates: its gates.
        heads: the heads that each layer keeps.
        units: the number of MLP units that each layer keeps; the first ones are kept. The pooler,
            whose units a record does not count, keeps all; it has less than 0.2 % of the MACs.
    """
    kept: dict[str, Sequence[int]] = {}
    of_heads = [gate for gate in gates if gate.name.endswith("query")]
    of_units = [gate for gate in gates if "intermediate" in gate.name]
    kept |= {gate.name: index for gate, index in zip(of_heads, heads, strict=True)}
    kept |= {gate.name: range(count) for gate, count in zip(of_units, units, strict=True)}
    theta = {}
    for gate in gates:
        theta[gate.name] = torch.zeros(gate.size, device="cpu")
        theta[gate.name][list(kept.get(gate.name, range(gate.size)))] = 1.0
    small, _ = checked_shrink(net, gates, theta, example())
    return small


def export_program(net: nn.Module, path: Path) -> float:
    """Write a network as an ONNX program with dynamic batch and length, and run it.

    Returns:
        The largest difference of its logits from the network's at two batch sizes and lengths,
        relative to the largest logit.
    """
    import onnxruntime

    net.eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
    shape = {0: batch, 1: length}
    program = torch.onnx.export(
        net,
        kwargs=example(2),
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for size in SHAPES:
        x = example(*size)
        x["attention_mask"][-1, -3:] = 0
        (found,) = session.run(None, {name: value.numpy() for name, value in x.items()})
        with torch.no_grad():
            expected = net(**x)
        difference = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(difference))
    return worst


def reloads(net: nn.Module, directory: Path) -> bool:
    """Whether a saved network has equal outputs after it is loaded in a new process without
    Pyro."""
    inputs, outputs = directory / "inputs.pt", directory / "outputs.pt"
    torch.save([example(*shape) for shape in SHAPES], inputs)
    files = [str(directory / "network"), str(inputs), str(outputs)]
    subprocess.run([sys.executable, "-c", RELOAD, *files, str(torch.get_num_threads())], check=True)
    with torch.no_grad():
        here = [net(**example(*shape)) for shape in SHAPES]
    there = torch.load(outputs, weights_only=True)
    return all(torch.equal(x, y) for x, y in zip(here, there, strict=True))


def measured(dense: nn.Module, small: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Size, ONNX difference and latency of a smaller network, after it was saved and loaded.

    Raises:
        RuntimeError: the network has other outputs after it is loaded in a new process.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = small.net.config.to_dict()  # type: ignore[union-attr,operator]
        sbp.save(small, directory / "network", build, {"config": config})
        if not reloads(small.eval(), directory):
            raise RuntimeError("the reloaded network has other outputs")
        difference = export_program(small, directory / "network.onnx")
    result = sbp.benchmark(
        dense,
        small,
        example(1),
        runtimes=("eager", "onnxruntime"),
        devices=("cpu",),
        **options,
    )
    return {**description(small), "onnx_difference": difference, **result.to_dict()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pyro_sbp.experiments.minilm_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the pretrained model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the record")
    parser.add_argument("--batch-size", type=int, nargs="+", default=(1, 32), help="batch sizes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    path = RESULTS / f"seed-{given.seed}.json"
    try:
        entry = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RequestError(
            f"the record {path.name} of this seed cannot be read: {error}"
        ) from error
    dense = pretrained(given.model)
    gates = sbp.find_gates(dense, example())
    networks = {}
    for name, network in entry["networks"].items():
        if "heads" not in network:
            continue
        small = of_shape(dense, gates, network["heads"], network["units"])
        networks[name] = measured(dense, small, {"batch_sizes": given.batch_size})
        print(name, networks[name], sep="\n", flush=True)
    command = f"python -m pyro_sbp.experiments.minilm_speed --model MODEL --seed {given.seed}"
    result = {
        "seed": given.seed,
        "command": command,
        "networks": networks,
        "versions": {
            **versions(), **{name: version(name) for name in ("transformers", "onnxruntime")}
        },
        "machine": machine(torch.device("cpu")),
    }  # fmt: skip
    write_json(RESULTS / "speed.json", result)


if __name__ == "__main__":
    main()
