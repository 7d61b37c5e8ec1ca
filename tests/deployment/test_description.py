"""The content of network.json: what is written is read, and what is damaged is refused."""

import dataclasses
import json

import pytest

from pyro_sbp.deployment.description import Description, UnknownFormat, parse_json

DESCRIPTION = Description(
    constructor="package.module:Net",
    kwargs={"classes": 10},
    input_shape=[1, 28, 28],
    layers={"fc1": {"in_features": 5, "select": 5}},
    same={"decoder.weight": "encoder.weight"},
    standardize={"mean": [0.1], "std": [0.3]},
    frozen=["fc1.bias"],
    buffers=["mask"],
    checksums={"model.safetensors": "0" * 64},
)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "network.json"
    path.write_text(DESCRIPTION.to_json())
    assert Description.read(path) == DESCRIPTION
    assert Description.from_json(DESCRIPTION.to_json()).to_json() == DESCRIPTION.to_json()


def test_the_layout_of_the_text_is_not_part_of_its_checksum():
    content = json.loads(DESCRIPTION.to_json())
    text = json.dumps(dict(reversed(content.items())))
    assert Description.from_json(text) == DESCRIPTION
    for change in ({"constructor": "other:Net"}, {"kwargs": {}}, {"of a later version": 1}):
        with pytest.raises(ValueError, match="it differs from its checksum"):
            Description.from_json(json.dumps({**content, **change}))


def test_sizes_of_modules_need_a_reader_that_knows_them():
    assert json.loads(DESCRIPTION.to_json())["format"] == 1
    sizes = {"block.attn": {"num_heads": 2, "parts": [8, 8]}}
    described = dataclasses.replace(DESCRIPTION, sizes=sizes)
    assert json.loads(described.to_json())["format"] == 2
    assert Description.from_json(described.to_json()) == described


def test_a_file_without_checksums_may_have_unknown_keys():
    content = json.loads(DESCRIPTION.to_json())
    del content["checksums"], content["frozen"]
    found = Description.from_json(json.dumps({**content, "of a later version": 1}))
    assert (found.checksums, found.frozen, found.kwargs) == (None, None, {"classes": 10})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"constructor": ""}, "constructor is ''; expected a name of a callable"),
        ({"input_shape": [0, 3]}, "input_shape is .*; expected positive integers"),
        ({"layers": {"a": {"depth": 3}}}, "sets 'depth', which no layer has"),
        ({"layers": {"a": {"in_features": True}}}, "is True; expected an integer of 0 or more"),
        ({"sizes": {"a": {"heads": True}}}, "is True; expected an integer of 0 or more, or a list"),
        ({"sizes": {"a": {"heads": [1, "b"]}}}, "expected an integer of 0 or more, or a list"),
        ({"sizes": {"a": 3}}, r"sizes\['a'\] is 3; expected an object"),
        ({"standardize": {"mean": [0.1], "std": []}}, "of the same length"),
        ({"standardize": {"mean": [10**400], "std": [1]}}, "expected lists of finite numbers"),
        ({"checksums": {"../model.safetensors": "0" * 64}}, "expected SHA-256 digests by file"),
        ({"checksums": {"model.safetensors": "0" * 63}}, "expected SHA-256 digests by file"),
    ],
)
def test_a_value_out_of_range_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Description(**{"constructor": "a:B", "kwargs": {}, **change})


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "network.json"
    with pytest.raises(ValueError, match=r"network\.json cannot be read: No such file"):
        Description.read(path)
    for content in (b"\xff", b"{", b"[]", b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"network\.json is damaged: "):
            Description.read(path)
    path.write_text('{"format": 3, "constructor": "a:B", "kwargs": {}, "layers": {}}')
    with pytest.raises(
        UnknownFormat, match="format 3; this version of pyro-sbp reads formats 1 and 2"
    ):
        Description.read(path)


def test_ambiguous_json_is_refused():
    with pytest.raises(ValueError, match="the key 'a' appears twice"):
        parse_json('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="it is nested too deeply"):
        parse_json("[" * 100_000)
