"""Save pruned networks for the Hugging Face Hub, and load them from it.

Local folders need no other package. The Hub needs ``huggingface_hub``: ``pip install
'pyro-sbp[hub]'``. Loading needs no Pyro.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pyro_sbp.datasets.standardization import Standardization
from pyro_sbp.deployment.configurations import CONFIG, takes_config
from pyro_sbp.deployment.constructors import trusted
from pyro_sbp.deployment.description import INDEX, Description
from pyro_sbp.deployment.loading import load
from pyro_sbp.deployment.saving import FILES, network_files
from pyro_sbp.errors import first_line
from pyro_sbp.gates.units import units_as_dicts
from pyro_sbp.integrations.model_card import model_card

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

CARD = "README.md"
GENERATION = "generation_config.json"
_REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def save_pretrained(
    net: nn.Module,
    folder: str | Path,
    constructor: Callable[..., nn.Module] | str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    repo_id: str | None = None,
    results: Mapping[str, Any] | None = None,
    command: str | None = None,
    units: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    input_shape: Sequence[int] | None = None,
    standardization: Standardization | None = None,
    overwrite: bool = False,
) -> None:
    """Write a pruned network to a folder that can be pushed to the Hugging Face Hub.

    The folder contains the files of `pyro_sbp.save`, ``config.json``, and the model card
    ``README.md``. For a model of transformers, ``config.json`` is its own configuration. Other
    files in the folder, such as those of a tokenizer, are not changed.

    Args:
        net: the network, from `pyro_sbp.prune` or `pyro_sbp.Pruner.prune`.
        folder: the folder to write.
        constructor: the function or class that builds the original network, as for `pyro_sbp.save`.
            The default for a model of transformers is its class.
        kwargs: the arguments of the constructor, plain values.
        repo_id: the name that the network will have on the Hub, for the model card.
        results: the table of the model card. It maps the name of a network to named values, such as
            ``{"dense": {"accuracy": 0.93}, "pruned": {"accuracy": 0.92}}``, or is a mapping of
            named values.
        command: the command that produced the network, for the model card.
        units, input_shape, standardization: as for `pyro_sbp.save`.
        base_model, license: their names on the Hub, for the model card.
        overwrite: whether to replace a network in the folder.

    Raises:
        FileExistsError: the folder contains a network or a model card, and `overwrite` is not set.
        ValueError: the constructor is missing, or builds a network with other layers.
        OSError: a file cannot be written.
    """
    path = Path(folder)
    if constructor is None:
        if not takes_config(type(net)):
            raise ValueError(
                f"the constructor of {type(net).__name__} is missing; "
                "give the function or class that builds it"
            )
        constructor = type(net)
    there = {file.name for file in path.iterdir()} if path.exists() else set()
    taken = sorted(there & {*FILES, CARD})
    if taken and not overwrite:
        raise FileExistsError(f"{path} has {taken[0]}: give another folder, or overwrite=True")
    files = network_files(
        net,
        constructor,
        kwargs,
        units=units,
        input_shape=input_shape,
        standardization=standardization,
    )
    files.write(path)
    num_parameters = sum(parameter.numel() for parameter in net.parameters())
    _write_configs(path, net, files.description, num_parameters)
    # Without resized layers, the configuration of transformers has the new numbers of units.
    of_transformers = takes_config(type(net)) and not files.description.layers
    card = model_card(
        (repo_id or path.resolve().name).rpartition("/")[2],
        library="transformers" if of_transformers else "pyro-sbp",
        load=_code(files.description, repo_id or str(folder)),
        num_parameters=num_parameters,
        results=results,
        units=units_as_dicts(net) if units is None else units,
        command=command,
        base_model=base_model,
        license=license,
    )
    _write(path / CARD, card)


def _write_configs(
    path: Path, net: nn.Module, description: Description, num_parameters: int
) -> None:
    """Write the files of configuration that `pyro_sbp.save` does not write."""
    if not takes_config(type(net)):
        config = {
            "library_name": "pyro-sbp",
            "constructor": description.constructor,
            "kwargs": description.kwargs,
            "input_shape": description.input_shape,
            "num_parameters": num_parameters,
        }
        _write(path / CONFIG, json.dumps(config, indent=2) + "\n")
    generation: Any = getattr(net, "generation_config", None)
    if generation is not None:
        _write(path / GENERATION, generation.to_json_string())


def from_pretrained(
    name: str | Path,
    constructor: Callable[..., nn.Module] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> nn.Module:
    """Load a pruned network from a folder or from the Hugging Face Hub, in evaluation mode.

    Args:
        name: a folder that `save_pretrained` wrote, or the name of a repository, ``owner/name``.
        constructor: the function or class that builds the original network, as for `pyro_sbp.load`.
            Networks of pyro-sbp, torchvision, timm and transformers need none.
        revision, token, cache_dir: as for ``huggingface_hub.snapshot_download``.

    Raises:
        ValueError: the folder or repository does not exist, a file is missing or damaged, or a
            constructor is needed.
        ImportError: huggingface_hub, which a repository needs, is not installed.
    """
    path = Path(name)
    if not path.is_dir():
        if not _REPO_ID.fullmatch(str(name)):
            raise ValueError(f"there is no folder {name}")
        hub = _hub()
        try:
            found = hub.snapshot_download(
                str(name), revision=revision, token=token, cache_dir=cache_dir,
                allow_patterns=[*FILES, GENERATION],
            )  # fmt: skip
        except (OSError, ValueError) as error:  # the base classes of the errors of huggingface_hub
            raise ValueError(
                f"{name} is neither a folder nor a repository that can be read from the Hub: "
                f"{first_line(error)}"
            ) from error
        path = Path(found)
    net = load(path, constructor)
    if (path / GENERATION).is_file() and hasattr(net, "generation_config"):
        content = json.loads((path / GENERATION).read_text(encoding="utf-8"))
        net.generation_config = type(net.generation_config).from_dict(content)  # type: ignore[union-attr]
    return net


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = "Pruned network",
) -> str:
    """Upload a folder that `save_pretrained` wrote to the Hugging Face Hub.

    Args:
        folder: the folder, with other files that belong to the network, such as a tokenizer.
        repo_id: the repository, ``owner/name``. It is created if it does not exist.
        private, token, revision: as for ``huggingface_hub.HfApi``.
        message: the message of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the folder contains no complete saved network.
        ImportError: huggingface_hub is not installed.
    """
    path = Path(folder)
    try:
        Description.read(path / INDEX)
    except ValueError as error:
        raise ValueError(f"{path} has no complete saved network: {first_line(error)}") from error
    api = _hub().HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=path, revision=revision, commit_message=message,
        ignore_patterns=["*.part"],
    )  # fmt: skip
    return str(commit.commit_url)


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError("the Hub needs huggingface_hub: pip install 'pyro-sbp[hub]'") from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _code(description: Description, name: str) -> str:
    """Python code that loads a network."""
    lines = ["from pyro_sbp.integrations.hub import from_pretrained", ""]
    argument = ""
    module, _, attribute = description.constructor.partition(":")
    try:
        known = trusted(description.constructor, description.kwargs) is not None
    except ImportError:
        known = True
    if not known:
        lines.insert(1, f"from {module} import {attribute.partition('.')[0]}")
        argument = f", constructor={attribute}"
    return "\n".join([*lines, f"net = from_pretrained({name!r}{argument})"])
