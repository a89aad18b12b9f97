"""Folding names: the ranges stand for exactly the names that were given."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.notation.folding import fold, fold_names


def expand(text: str) -> list[str]:
    """The names that a folded one stands for."""
    parts = re.split(r"\[([0-9,-]+)\]", text)
    choices = [[part] for part in parts]
    for k in range(1, len(parts), 2):
        choices[k] = []
        for piece in parts[k].split(","):
            first, _, last = piece.partition("-")
            width = len(first) if first[0] == "0" else 1
            choices[k] += [f"{n:0{width}d}" for n in range(int(first), int(last or first) + 1)]
    return ["".join(chosen) for chosen in product(*choices)]


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([f"layers.{i}.self_attn.q_proj.weight" for i in range(80)], ["layers.[0-79].self_attn.q_proj.weight"]),
        ([f"l.{i}.e.{e}.w" for i in (3, 4, 5) for e in range(256)], ["l.[3-5].e.[0-255].w"]),
        (["norm", "l.0", "l.1", "head"], ["norm", "l.[0-1]", "head"]),
        (["l.0", "l.2", "l.3", "l.7"], ["l.[0,2-3,7]"]),
        (["x.0.0", "x.0.1", "x.1.0"], ["x.0.[0-1]", "x.1.0"]),
        ([f"model-{n:05d}-of-00012.safetensors" for n in range(1, 13)], ["model-[00001-00012]-of-00012.safetensors"]),
        ([f"h{n}" for n in range(9, 11)], ["h[9-10]"]),
        ([], []),
    ],
)
def test_names_that_differ_in_numbers(names, folded):
    assert fold_names(names) == folded


def test_a_number_that_follows_another_one_is_a_range_too():
    rows = [("k", (f"blocks.{i + 1}.qkv", f"layers.{i}.q", f"layers.{i}.k")) for i in range(4)]
    (found,) = fold(rows)
    assert found == (("blocks.[1-4].qkv", "layers.[0-3].q", "layers.[0-3].k"), [0, 1, 2, 3])


def test_rows_of_different_keys_stay_apart():
    rows = [((8,) if i < 3 else (4,), (f"l.{i}",)) for i in range(6)]
    assert [(found.texts, found.members) for found in fold(rows)] == [(("l.[0-2]",), [0, 1, 2]), (("l.[3-5]",), [3, 4, 5])]


# Numbers of one and the same place are never in step with another's here: then a fold's ranges are exact, not just their count.
@given(st.sets(st.tuples(st.sampled_from("ab"), st.integers(0, 12), st.sampled_from([0, 3, 4, 50])), max_size=30))
def test_folds_stand_for_the_names_and_no_others(points):
    rows = [f"{kind}.{i}.w" if kind == "a" else f"{kind}.{i}.e.7.{e}" for kind, i, e in sorted(points)]
    names = list(dict.fromkeys(rows))
    found = list(fold((None, (name,)) for name in names))
    assert sorted(k for kind in found for k in kind.members) == list(range(len(names)))
    for kind in found:
        wanted = Counter(names[k] for k in kind.members)
        spans = expand(kind.texts[0])
        assert wanted.keys() <= set(spans)
        in_step = len(spans) != len(wanted)  # two numbers that rise together
        assert not in_step or len({name.count("e") for name in wanted}) == 1
        if not in_step:
            assert Counter(spans) == wanted
