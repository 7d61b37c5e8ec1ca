"""The content of ``network.json``, which is validated when it is read and when it is written."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyro_sbp.errors import damage
from pyro_sbp.gates.layers import SIZE_ATTRIBUTES

__all__ = ["INDEX", "Description", "UnknownFormat", "parse_json"]

#: The name of the file.
INDEX = "network.json"
#: The formats that can be read. Format 2 has "sizes", which a reader must not ignore.
FORMATS = (1, 2)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Description:
    """How to build a saved network.

    Attributes:
        constructor: the constructor of the original network, as ``module:callable``.
        kwargs: its arguments, as JSON values.
        input_shape: the shape of one example, if it is known.
        separate_attention: whether `separate_attention` is applied to the constructed network.
        layers: from the name of a layer to the sizes that differ from the constructed network:
            attributes of the layer, and "select", the length of the index of a `Select` before it.
        sizes: from the name of a module that contains such layers to its changed attributes. They
            are integers or tuples of integers, such as numbers of units that its code uses.
        same: for tensors with two names, from the name that is not in the file to the name that is.
        standardize: the "mean" and "std" of each channel for standardizing inputs; None if inputs
            are not standardized.
        frozen: the parameters that do not require gradients; None in files of earlier versions.
        buffers: the stored buffers that are not part of the state dict.
        checksums: from the name of each other file to its SHA-256; None in files without checksums.

    Raises:
        ValueError: a value has the wrong type, or is out of range.
    """

    constructor: str
    kwargs: Mapping[str, Any]
    input_shape: Sequence[int] | None = None
    separate_attention: bool = False
    layers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, int | Sequence[int]]] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=dict)
    standardize: Mapping[str, Sequence[float]] | None = None
    frozen: Sequence[str] | None = None
    buffers: Sequence[str] = ()
    checksums: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        _check("constructor", self.constructor, _is_name, "a name of a callable")
        _check("kwargs", self.kwargs, _is_mapping, "an object")
        _check("input_shape", self.input_shape, _optional(_is_shape), "positive integers, or null")
        _check("separate_attention", self.separate_attention, _is_bool, "true or false")
        _check("layers", self.layers, _is_mapping, "an object")
        for layer, sizes in self.layers.items():
            _check(f"layers[{layer!r}]", sizes, _is_mapping, "an object")
            for name, size in sizes.items():
                if name not in (*SIZE_ATTRIBUTES, "select"):
                    raise ValueError(f"layers[{layer!r}] sets {name!r}, which no layer has")
                _check(f"layers[{layer!r}][{name!r}]", size, _is_size, "an integer of 0 or more")
        _check("sizes", self.sizes, _is_mapping, "an object")
        for module, written in self.sizes.items():
            _check(f"sizes[{module!r}]", written, _is_mapping, "an object")
            for name, value in written.items():
                _check(f"sizes[{module!r}][{name!r}]", value, _is_sizes,
                       "an integer of 0 or more, or a list of them")  # fmt: skip
        _check("same", self.same, _is_mapping, "an object")
        for name, first in self.same.items():
            _check(f"same[{name!r}]", first, _is_string, "the name of a tensor")
        _check("standardize", self.standardize, _optional(_is_standardization),
               "lists of finite numbers, mean and std, of the same length")  # fmt: skip
        _check("frozen", self.frozen, _optional(_is_names), "a list of names, or null")
        _check("buffers", self.buffers, _is_names, "a list of names")
        _check("checksums", self.checksums, _optional(_is_checksums), "SHA-256 digests by file")

    @classmethod
    def read(cls, path: Path) -> Description:
        """Read a ``network.json``.

        Raises:
            UnknownFormat: the file has a format that this version does not read.
            ValueError: the file is missing or damaged. The message does not name the directory.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path.name} is damaged: it is not UTF-8") from error
        try:
            return cls.from_json(text)
        except UnknownFormat:
            raise
        except ValueError as error:
            raise ValueError(f"{path.name} is damaged: {damage(error)}") from error

    @classmethod
    def from_json(cls, text: str) -> Description:
        """The description from the content of a file.

        Raises:
            UnknownFormat: the file has a format that this version does not read.
            ValueError: the content is damaged.
        """
        content = parse_json(text)
        _check("the content", content, _is_mapping, "an object")
        for name in ("format", "constructor", "kwargs", "layers"):
            if name not in content:
                raise ValueError(f"{name!r} is missing")
        _check("format", content["format"], _is_size, "an integer")
        if content["format"] not in FORMATS:
            raise UnknownFormat(content["format"])
        checksums = None
        if "checksums" in content:
            _check("checksums", content["checksums"], _is_checksums, "SHA-256 digests by file")
            checksums = dict(content["checksums"])
            own = checksums.pop(INDEX, None)
            if own != _digest({**content, "checksums": checksums}):
                raise ValueError("it differs from its checksum")
        # Unknown keys, which later versions may write, are ignored.
        fields = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        return cls(**{**fields, "checksums": checksums})

    def to_json(self) -> str:
        """The content of the file. Equal descriptions give the same text.

        Raises:
            TypeError, ValueError: JSON cannot represent the constructor's arguments.
        """
        content: dict[str, Any] = {
            "format": 2 if self.sizes else 1,
            "constructor": self.constructor,
            "kwargs": self.kwargs,
            "input_shape": self.input_shape,
            "separate_attention": self.separate_attention,
            "layers": self.layers,
            "same": self.same,
        }
        if self.sizes:
            content["sizes"] = self.sizes
        if self.standardize is not None:
            content["standardize"] = self.standardize
        if self.frozen is not None:
            content["frozen"] = self.frozen
        if self.buffers:
            content["buffers"] = self.buffers
        if self.checksums is not None:
            content["checksums"] = {**self.checksums}
            # Convert to the values that a reader gets, because JSON has no tuples, and no numbers
            # as keys.
            digest = _digest(json.loads(json.dumps(content)))
            content["checksums"][INDEX] = digest
        return json.dumps(content, indent=2) + "\n"


class UnknownFormat(ValueError):
    """The file has a format that this version of pyro-sbp does not read."""

    def __init__(self, format: int) -> None:
        known = " and ".join(map(str, FORMATS))
        super().__init__(f"format {format}; this version of pyro-sbp reads formats {known}")


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: the text is not JSON, an object has the same key twice, or the value is nested
            too deeply to be written again.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        json.dumps(value)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {reprlib.repr(key)} appears twice")
        content[key] = value
    return content


def _digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a value. It does not depend on the order of keys or on white space."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _check(name: str, value: Any, is_right: Callable[[Any], bool], expected: str) -> None:
    if not is_right(value):
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected {expected}")


def _optional(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and value != ""


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sizes(value: Any) -> bool:
    return _is_size(value) or (_is_list(value) and all(map(_is_size, value)))


def _is_names(value: Any) -> bool:
    return _is_list(value) and all(isinstance(name, str) for name in value)


def _is_shape(value: Any) -> bool:
    return _is_list(value) and all(_is_size(size) and size > 0 for size in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_standardization(value: Any) -> bool:
    if not isinstance(value, Mapping) or value.keys() != {"mean", "std"}:
        return False
    lists = list(value.values())
    return all(_is_list(numbers) and all(map(_is_finite, numbers)) for numbers in lists) and (
        len(lists[0]) == len(lists[1])
    )


def _is_finite(value: Any) -> bool:
    # math.isfinite would raise OverflowError for a large integer.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _is_checksums(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        # Only names of files in the directory, not paths to other directories.
        Path(name).name == name and isinstance(digest, str) and _SHA256.fullmatch(digest)
        for name, digest in value.items()
    )
