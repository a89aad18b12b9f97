"""``streamconv merge``: the tensors of the result, for every method, and which of which they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, random_tensor, read, run, write
from merged_models import CONFIG, added, largest, linear, merge_file, merged, models, refused, slerp

import streamconv
from streamconv.merging.models import layer_of

Q, UP = "self_attn.q_proj.weight", "mlp.up_proj.weight"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def of(name: str, **parameters: Any) -> dict[str, Any]:
    return {"model": name, "parameters": parameters}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype, tmp_path: Path) -> None:
    first, second = models(tmp_path, 2, dtype)
    made = merged(tmp_path, {"models": [of("{m0}", weight=0.3), of("{m1}", weight="6e-1")], "merge_method": "linear"})
    assert_same(made, {name: linear([first[name], second[name]], [0.3, 0.6]) for name in first})


def test_filters_and_gradients(tmp_path: Path) -> None:
    first, second = models(tmp_path, 2)
    weights = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "up_proj", "value": [0.2, 0.4]}]
    made = merged(
        tmp_path,
        {
            "models": [of("{m0}", weight=1), of("{m1}", weight=weights)],
            "merge_method": "linear",
            "parameters": {"normalize": False, "weight": 0.25},
            "dtype": "float32",
            "out_dtype": "float16",
        },
    )
    for k, (attention, up) in enumerate(zip((0, 0.5, 1), (0.2, 0.30000000000000004, 0.4), strict=True)):
        for name, weight in ((Q, attention), (UP, up), ("norm.weight", 0.25)):
            own = f"model.layers.{k}.{name}"
            wanted = linear([first[own].float(), second[own].float()], [1, weight], normalize=False)
            assert torch.equal(made[own], wanted.half()), own
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic(normalize: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base, first, second = models(tmp_path, 3, dtype)
    text = {
        "models": [of("{m1}", weight=0.3), of("{m0}"), of("{m2}", weight=0.7)],
        "merge_method": "task_arithmetic",
        "base_model": "{m0}",
        "parameters": {"normalize": normalize, "lambda": 0.9},
    }
    made = merged(tmp_path, text)
    wanted = {}
    for name in base:
        wanted[name] = added(base[name], [first[name], second[name]], [0.3, 0.7], normalize=normalize, factor=0.9)
    assert_same(made, wanted)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slerp(dtype: torch.dtype, tmp_path: Path) -> None:
    first, second = models(tmp_path, 2, dtype)
    text = {"models": [{"model": "{m1}"}, {"model": "{m0}"}], "merge_method": "slerp", "base_model": "{m0}", "parameters": {"t": 0.3}}
    made = merged(tmp_path, text)
    assert made.keys() == first.keys()
    for name, tensor in made.items():
        wanted = slerp(first[name], second[name], 0.3)
        bound = (first[name].abs().float() + second[name].abs().float()) * (torch.finfo(dtype).eps if dtype != torch.float32 else 2**-22)
        assert ((tensor.float() - wanted.float()).abs() <= bound).all(), name


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rescale", [False, True])
def test_ties(rescale: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base, first, second = models(tmp_path, 3, dtype)
    text = {
        "models": [of("{m1}", weight=0.3, density=0.4), of("{m2}", weight=0.7, density=0.9)],
        "merge_method": "ties",
        "base_model": "{m0}",
        "parameters": {"rescale": rescale},
    }
    made = merged(tmp_path, text)
    wanted = {}
    for name in base:
        masks = [largest(first[name] - base[name], 0.4), largest(second[name] - base[name], 0.9)]
        both = [first[name], second[name]]
        wanted[name] = added(base[name], both, [0.3, 0.7], masks, normalize=True, elects=True, rescale=rescale)
    assert_same(made, wanted)


def test_of_deltas_of_one_size_those_count_that_lie_first(tmp_path: Path) -> None:
    base, other = torch.zeros(100, 300), torch.ones(100, 300)
    other[::7] = -1
    other[50:, 5] = 2
    for k, tensor in enumerate((base, other)):
        write(tmp_path / f"m{k}", {"w": tensor.bfloat16()})
    text = {"models": [of("{m1}", weight=1, density=0.5)], "merge_method": "ties", "base_model": "{m0}"}
    wanted = other * largest(other, 0.5)
    assert torch.equal(merged(tmp_path, text)["w"].float(), wanted)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare(method: str, tmp_path: Path) -> None:
    base, first, _ = models(tmp_path, 3)
    text: dict[str, Any] = {
        "models": [of("{m1}", weight=1.0, density=0.5), of("{m2}", weight=0.0, density=0.3)],
        "merge_method": method,
        "base_model": "{m0}",
        "parameters": {"rescale": False},
    }
    made = merged(tmp_path, text)
    masks = {name: made[name] != base[name] for name in base}
    differing = sum(int((first[name] != base[name]).sum()) for name in base)
    share = sum(int(mask.sum()) for mask in masks.values()) / differing
    assert 0.4 < share < 0.6
    assert_same(made, {name: added(base[name], [first[name]], [1.0], [masks[name]]) for name in base})
    del text["parameters"]
    assert_same(merged(tmp_path, text), {name: added(base[name], [first[name]], [1.0], [masks[name]], rescale=True) for name in base})
    other = merged(tmp_path, text, "--random-seed", 7)
    assert any(not torch.equal(other[name] != base[name], masks[name]) for name in base)


def test_slices_of_layers(tmp_path: Path) -> None:
    first, second = models(tmp_path, 2)
    text = """
slices:
  - sources: [{model: "{m0}", layer_range: [0, 2]}]
  - sources:
      - model: "{m1}"
        layer_range: [1, 3]
        parameters:
          scale: [{filter: up_proj, value: 0.3}]
merge_method: passthrough
"""
    made = merged(tmp_path, text)
    wanted = {name: first[name] for name in first if not name.startswith("model.layers.2")}
    wanted |= {name: second[name] for name in ("lm_head.weight", "model.norm.weight")}
    for k, own in ((2, 1), (3, 2)):
        wanted |= {f"model.layers.{k}.{name}": second[f"model.layers.{own}.{name}"] for name in (Q, "norm.weight")}
        wanted[f"model.layers.{k}.{UP}"] = second[f"model.layers.{own}.{UP}"] * 0.3
    assert_same(made, wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert config["layer_types"] == ["full", "sliding", "sliding", "linear"]
    plan = streamconv.plan(tmp_path / "merge.yaml", tmp_path / "p", max_memory=ROOMY)
    assert plan.account is not None
    assert (plan.account.copied, plan.account.computed) == (13, 2)
    (row,) = [row for row in plan.mapping if row.target == f"model.layers.3.{Q}"]
    assert (row.sources, row.layout) == ((f"model.layers.2.{Q}",), "")


def test_a_layer_that_stands_twice_is_stored_twice(tmp_path: Path) -> None:
    (only,) = models(tmp_path, 1)
    source = {"model": "{m0}", "layer_range": [0, 2]}
    made = merged(tmp_path, {"slices": [{"sources": [source]}, {"sources": [source]}], "merge_method": "passthrough"})
    assert len(made) == 15
    assert torch.equal(made[f"model.layers.3.{Q}"], only[f"model.layers.1.{Q}"])


def test_heads_of_tied_models(tmp_path: Path) -> None:
    models(tmp_path, 2, tie_word_embeddings=True)
    tied, other = read(tmp_path / "m0"), read(tmp_path / "m1")
    del tied["lm_head.weight"]
    write(tmp_path / "m0", tied)
    text = {"models": [of("{m0}", weight=1), of("{m1}", weight=1)], "merge_method": "linear"}
    made = merged(tmp_path, text)
    assert torch.equal(made["lm_head.weight"], linear([tied["model.embed_tokens.weight"], other["lm_head.weight"]], [1, 1]))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    del other["lm_head.weight"]
    write(tmp_path / "m1", other)
    assert "lm_head.weight" not in merged(tmp_path, text)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("tied", [0, 1])
def test_heads_where_slices_are_of_tied_models_and_others(tied: int, tmp_path: Path) -> None:
    """The first one has the embedding, the last one the head."""
    models(tmp_path, 2, tie_word_embeddings=False)
    both = [read(tmp_path / f"m{k}") for k in range(2)]
    del both[tied]["lm_head.weight"]
    write(tmp_path / f"m{tied}", both[tied], config={**CONFIG, "tie_word_embeddings": True})
    slices = [{"sources": [{"model": f"{{m{k}}}", "layer_range": [k, k + 2]}]} for k in range(2)]
    made = merged(tmp_path, {"slices": slices, "merge_method": "passthrough"})
    assert torch.equal(made["lm_head.weight"], both[1].get("lm_head.weight", both[1]["model.embed_tokens.weight"]))
    assert torch.equal(made["model.embed_tokens.weight"], both[0]["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_slices_of_models_of_other_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models(tmp_path, 2)
    wide = {name: torch.cat([tensor, tensor], 0) if "up_proj" in name else tensor for name, tensor in read(tmp_path / "m1").items()}
    write(tmp_path / "m1", wide)
    slices = [{"sources": [{"model": f"{{m{k}}}", "layer_range": [0, 2]}]} for k in range(2)]
    line = refused(tmp_path, {"slices": slices, "merge_method": "passthrough"}, capsys)
    assert "model.layers.0.mlp.up_proj.weight of FOLDER/m1 has shape [16, 6], in FOLDER/m0 it is [8, 6]" in line


def test_whole_numbers_must_be_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"w": random_tensor(4, 4), "position_ids": torch.arange(6)}
    write(tmp_path / "m0", base)
    write(tmp_path / "m1", base)
    text = {"models": [of("{m0}", weight=1), of("{m1}", weight=1)], "merge_method": "linear"}
    assert_same(merged(tmp_path, text), base)
    write(tmp_path / "m1", base | {"position_ids": torch.arange(1, 7)})
    assert run("merge", merge_file(tmp_path, text), tmp_path / "none", "--quiet", "--max-memory", ROOMY) == 2
    assert "position_ids" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_experts_are_one_tensor_where_all_of_it_counts(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{k}.{part}_proj.weight" for k in range(2) for part in ("gate", "up")]
    both = []
    for k in range(2):
        tensors = {name: random_tensor(4, 6, seed=seed) + k * random_tensor(4, 6, seed=50 + seed) for seed, name in enumerate(names)}
        write(tmp_path / f"m{k}", tensors)
        both.append(tensors)
    fused = [torch.stack([tensors[name] for name in names]) for tensors in both]
    ties = {"models": [of("{m1}", weight=1, density=0.3)], "merge_method": "ties", "base_model": "{m0}"}
    wanted = added(fused[0], [fused[1]], [1], [largest(fused[1] - fused[0], 0.3)], normalize=True, elects=True)
    assert_same(merged(tmp_path, ties), dict(zip(names, wanted, strict=True)))
    text = {"models": [{"model": "{m0}"}, {"model": "{m1}"}], "merge_method": "slerp", "base_model": "{m0}", "parameters": {"t": 0.4}}
    made = merged(tmp_path, text)
    assert ((torch.stack([made[name] for name in names]) - slerp(*fused, 0.4)).abs() < 1e-6).all()


def test_an_adapter_behind_a_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (only,) = models(tmp_path, 1, torch.float32)
    module = "model.layers.1.self_attn.q_proj"
    down, up = torch.eye(2, 6), torch.eye(6, 2)
    (tmp_path / "a").mkdir()
    keys = {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}
    save_file(keys, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    text = {"models": [of("{m0}", weight=0), of(f"{{m0}}+{tmp_path / 'a'}", weight=1)], "merge_method": "linear"}
    made = merged(tmp_path, text)
    assert_same(made, only | {f"{module}.weight": only[f"{module}.weight"] + 2 * up @ down})


def test_the_call(tmp_path: Path) -> None:
    first, second = models(tmp_path, 2)
    text = {"models": [of("{m0}", weight=1), of("{m1}", weight=1)], "merge_method": "linear", "parameters": {"int8_mask": True}}
    result = streamconv.merge(merge_file(tmp_path, text), tmp_path / "out", max_memory=ROOMY, verify=True)
    assert result.verified
    assert any("int8_mask is no parameter of linear" in note for note in result.notes)
    assert_same(read(tmp_path / "out"), {name: linear([first[name], second[name]], [1, 1]) for name in first})
    assert {Path(source.path).parent.name for source in result.plan.sources} == {"m0", "m1"}
    with pytest.raises(streamconv.UsageError, match=r"a file of mergekit"):
        streamconv.merge(tmp_path / "m0", tmp_path / "none")


def test_what_a_name_says() -> None:
    assert layer_of("model.layers.10.mlp.experts.3.w1.weight").name == "mlp.experts.3.w1.weight"
    assert (layer_of("transformer.h.2.attn.weight").stack, layer_of("h.2.attn.weight").number) == ("transformer.h", 2)
    assert [layer_of(name).is_before for name in ("wte.weight", "model.embed_tokens.weight", "embed_out.weight", "norm.weight")] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("text", [{"merge_method": "linear"}, {"merge_method": "ties", "base_model": "{one}"}])
def test_tensors_without_dimensions(text: dict[str, Any], tmp_path: Path) -> None:
    """Such as the scale of CLIP's logits."""
    for name, value in (("one", 1.0), ("two", 2.0)):
        write(tmp_path / name, {"logit_scale": torch.tensor(value)})
    paths = {name: str(tmp_path / name) for name in ("one", "two")}
    listed = [{"model": path, "parameters": {"weight": 1}} for path in paths.values()]
    whole = {key: value.format(**paths) for key, value in text.items()} | {"models": listed}
    (tmp_path / "merge.yaml").write_text(json.dumps(whole))
    assert run("merge", tmp_path / "merge.yaml", tmp_path / "out") == 0
    wanted = 1.5 if text["merge_method"] == "linear" else 2.0
    assert_same(read(tmp_path / "out"), {"logit_scale": torch.tensor(wanted)})


def layered(folder: Path, kinds: str, **config: Any) -> None:
    """A model of layers with experts (``s``), without (``d``), or of another kind."""
    names = {"s": "mlp.experts.0.up_proj.weight", "d": "mlp.up_proj.weight"}
    tensors = {f"model.layers.{k}.{names.get(kind, kind)}": torch.full((2, 2), float(k)) for k, kind in enumerate(kinds)}
    write(folder / "m0", tensors, config={"model_type": "toy", "num_hidden_layers": len(kinds), **config})


def sliced(*ranges: tuple[int, int]) -> dict[str, Any]:
    slices = [{"sources": [{"model": "{m0}", "layer_range": list(ends)}]} for ends in ranges]
    return {"slices": slices, "merge_method": "passthrough"}


@pytest.mark.parametrize(
    ("kinds", "config", "ranges", "wanted"),
    [
        ("dss", {"first_k_dense_replace": 1}, [(1, 3)], {"first_k_dense_replace": 0}),
        ("dss", {"first_k_dense_replace": 1}, [(0, 1), (0, 3)], {"first_k_dense_replace": 2}),
        ("dsds", {"mlp_only_layers": [], "decoder_sparse_step": 2}, [(1, 4)], {"mlp_only_layers": [1], "decoder_sparse_step": 1}),
        ("dsds", {"moe_layers": [1, 3]}, [(0, 1), (2, 4)], {"moe_layers": [2]}),
        ("dsds", {"mlp_layer_types": [*"dsds"]}, [(1, 4)], {"mlp_layer_types": [*"sds"]}),
        ("dsds", {}, [(2, 4), (0, 2)], {}),
        ("dss", {"moe_layer_start_index": 1, "moe_layer_end_index": 2}, [(0, 3), (2, 3)], {"moe_layer_end_index": 3}),
        ("abab", {"hybrid_override_pattern": "M*M*"}, [(1, 4), (0, 1)], {"hybrid_override_pattern": "*M*M"}),
        ("ssss", {"mlp_only_layers": [], "decoder_sparse_step": 1}, [(1, 4)], {"mlp_only_layers": [], "decoder_sparse_step": 1}),
    ],
)
def test_config_says_which_layers_have_experts(
    kinds: str, config: dict[str, Any], ranges: list[tuple[int, int]], wanted: dict[str, Any], tmp_path: Path
) -> None:
    layered(tmp_path, kinds, **config)
    merged(tmp_path, sliced(*ranges))
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: made[key] for key in wanted} == wanted, made
    assert made.keys() == {"model_type", "num_hidden_layers", *config}


@pytest.mark.parametrize(
    ("kinds", "config", "layers"),
    [("dsds", {}, (1, 0)), ("abab", {"first_k_dense_replace": 1}, (1, 0)), ("ddss", {"first_k_dense_replace": 2}, (2, 1))],
)
def test_layers_whose_kind_no_key_tells_are_refused(
    kinds: str, config: dict[str, Any], layers: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layered(tmp_path, kinds, **config)
    line = refused(tmp_path, sliced((1, 3), (0, 1)), capsys)
    assert line.startswith(
        f"FILE:2: layer {layers[0]} of FOLDER/m0 would be layer {layers[1]}, where config.json has a layer of another kind: "
    )


def test_lists_of_layers_are_cut_where_no_key_counts_these(tmp_path: Path) -> None:
    layered(tmp_path, "abab")
    (tmp_path / "m0" / "config.json").write_text(json.dumps({"model_type": "toy", "layers_block_type": [*"xyxy"]}))
    merged(tmp_path, sliced((1, 4)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layers_block_type"] == [*"yxy"]
