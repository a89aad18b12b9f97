"""What a conversion says at its end of all its tensors."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_files import numbered, run, write

import streamconv
from streamconv.planning.plan import Account, Plan
from streamconv.recipe import Drop, Option, Recipe, Rule, Tie

FACTS = Recipe(
    name="toy-a2b",
    summary="a toy",
    rules=(
        Rule("layers.{i}.{q,k}", "blocks.{i}.qk", "a c, a c -> (a + a) c"),
        Rule("layers.{i}.wide", "blocks.{i}.tall", "a c -> c a"),
        Rule("layers.{i}.norm", "blocks.{i}.norm", cast="float32"),
        Rule("layers.{i}.same", "layers.{i}.same"),
        Rule("embed", "embedding"),
        Tie("embed", "head", "embedding", when="tied"),
        Drop("layers.{i}.inv_freq", "computed by the model"),
        Drop("step", "of training"),
    ),
    options={"tied": Option("the head is the embedding", default=True)},
)
SHAPES = {"q": (4, 6), "k": (4, 6), "wide": (3, 5), "norm": (6,), "same": (2,), "inv_freq": (3,)}


@pytest.fixture
def source(tmp_path):
    tensors = numbered({f"layers.{i}.{name}": shape for i in range(2) for name, shape in SHAPES.items()}, torch.bfloat16)
    return write(tmp_path / "a", tensors | numbered({"embed": (8, 6), "step": (1,)}))


def test_every_tensor_is_accounted_for(source, tmp_path):
    result = streamconv.convert(source, tmp_path / "b", recipe=FACTS, max_memory="4GB")
    wanted = {
        "tensors": 10,  # qk, tall, norm, same of two layers, embedding, head
        "copied": 6,  # qk, same, embedding, head
        "computed": 4,  # tall, norm
        "renamed": 4,  # norm, embedding, head
        "dropped": {"layers.{i}.inv_freq": 2, "step": 1},
        "tied": 1,
        "cast": 2,
    }
    assert result.summary()["summary"] == wanted
    assert str(result).endswith(
        "10 tensors: 6 copied, 4 computed, 4 renamed, 3 dropped (2 by 'layers.{i}.inv_freq', 1 by 'step'), 1 tied, 2 cast"
    )
    back = streamconv.convert(tmp_path / "b", tmp_path / "back", recipe=FACTS.inverse("toy-b2a"), max_memory="4GB")
    account = back.plan.account
    assert (account.tensors, account.copied, account.computed, account.tied, account.dropped) == (11, 9, 2, 1, {})


def test_a_plan_keeps_its_account(source, tmp_path):
    made = streamconv.plan(source, tmp_path / "b", recipe=FACTS, max_memory="4GB")
    assert Plan.from_json(made.to_json()).account == made.account != Account()


def test_convert_ends_with_it_and_json_has_it(source, tmp_path, capsys):
    assert run("convert", source, tmp_path / "b", "--dtype", "float16") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "14 tensors: 0 copied, 14 computed, 0 renamed, 0 dropped, 0 tied, 14 cast"
    assert run("convert", source, tmp_path / "c", "--json") == 0
    assert json.loads(capsys.readouterr().out)["summary"] == {
        "tensors": 14, "copied": 14, "computed": 0, "renamed": 0, "dropped": {}, "tied": 0, "cast": 0,
    }  # fmt: skip
