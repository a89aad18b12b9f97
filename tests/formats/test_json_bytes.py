"""JSON by the fast ways is that of the json module, byte by byte and value by value."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import FormatError
from streamconv.formats.files import indented_json
from streamconv.formats.json_text import Repeated, parse_object
from streamconv.formats.safetensors import header_bytes
from streamconv.storage.locations import locate

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FLAT = st.dictionaries(TEXTS, TEXTS | st.integers(), max_size=4)
WHERE = locate("file.safetensors")


@given(FLAT | st.dictionaries(TEXTS, FLAT, max_size=4))
def test_an_index_is_that_of_the_json_module(table):
    assert indented_json(table) == json.dumps(table, indent=2, sort_keys=True).encode()


@given(st.dictionaries(TEXTS, TEXTS, max_size=3), st.sets(TEXTS, max_size=4))
def test_a_header_is_that_of_the_json_module(metadata, names):
    head, _ = header_bytes({name: TensorSpec(DTYPES["uint8"], (2,)) for name in names - {"__metadata__"}}, metadata)
    table = json.loads(head[8:])
    assert head[8:].rstrip(b" ") == json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()


PLAIN = TEXTS | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(PLAIN, lambda below: st.lists(below) | st.dictionaries(TEXTS, below), max_leaves=6)


@given(st.dictionaries(TEXTS, VALUES, max_size=4), st.booleans())
def test_an_object_is_that_of_the_json_module(table, ascii_only):
    raw = json.dumps(table, ensure_ascii=ascii_only).encode()
    assert repr(parse_object(WHERE, raw, "header")) == repr(json.loads(raw))


def test_a_key_that_is_said_twice_is_seen_whatever_else_has_colons():
    for text in ('{"a": 1, "a": 2}', '{"a" : 1, "a": 2}', '{"a": {}, "\\u0061": {}}', '{"b:": 1, "a": 1, "a": ":"}'):
        with pytest.raises(FormatError, match="names 'a' twice"):
            parse_object(WHERE, text.encode(), "header")
    table = parse_object(WHERE, b'{"a": {"b": 1, "b": 2}, "c": [-0]}', "header")
    assert isinstance(table["a"], Repeated)
    assert table["c"] == [-1]
    assert parse_object(WHERE, b'{"c": [ -0], "m": "model-00001"}', "header")["c"] == [-1]
