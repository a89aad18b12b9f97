"""Tensor-parallel shards: there and back, plans of one's own, replicated heads, padded words, experts by rank; DeepSeek's own layout."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_files import assert_same, numbered, random_tensor, read, refusal, run, write
from ranked_models import MODELS
from safetensors.torch import load_file

import streamconv

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def ranks(folder, size):
    """The tensors of each rank."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    assert found == sorted(f"model{rank}-mp{size}.safetensors" for rank in range(size))
    return [load_file(folder / f"model{rank}-mp{size}.safetensors") for rank in range(size)]


def split(src, folder, size, *options):
    """What tp-split makes of a checkpoint, after checking that tp-merge brings it back."""
    own = [text for option in options for text in ("--set", option)]
    out, back = folder / f"ranks{size}", folder / f"back{size}"
    assert run("convert", src, out, "--recipe", "tp-split", "--set", f"model_parallel={size}", *own, "--quiet") == 0
    assert run("convert", out, back, "--recipe", "tp-merge", *own, "--quiet") == 0
    assert_same(read(back), read(src))
    assert (back / "config.json").read_bytes() == (out / "config.json").read_bytes() == (src / "config.json").read_bytes()
    return ranks(out, size)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", ["hub", "native"])
@pytest.mark.parametrize("kind", MODELS)
def test_split_then_merge_is_the_identity(checkpoints, tmp_path, kind, layout, size):
    found = split(checkpoints / kind / layout, tmp_path, size)
    whole = read(checkpoints / kind / layout)
    name = f"model.layers.0.{'self_attn.o' if kind == 'mixtral' else 'mlp.down'}_proj.weight"
    for rank in range(size):
        assert torch.equal(found[rank][name], whole[name].chunk(size, dim=1)[rank])
        assert torch.equal(found[rank]["model.norm.weight"], whole["model.norm.weight"])


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_ranks_of_both_layouts_hold_the_same_experts(checkpoints, tmp_path, kind):
    """A rank's part of an expert's gate and up is the same, fused or not."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    hub, native = (split(checkpoints / kind / layout, tmp_path / folder, 4) for layout, folder in (("hub", "a"), ("native", "b")))
    gate, up, down, where = {
        "mixtral": ("w1", "w3", "w2", "block_sparse_moe"),
        "deepseek_v3": ("gate_proj", "up_proj", "down_proj", "mlp"),
    }[kind]
    for mine, theirs in zip(hub, native, strict=True):
        layer = f"model.layers.1.{where}.experts"
        both = [torch.cat([mine[f"{layer}.{e}.{part}.weight"] for part in (gate, up)]) for e in range(8)]
        assert torch.equal(theirs["model.layers.1.mlp.experts.gate_up_proj"], torch.stack(both))
        downs = torch.stack([mine[f"{layer}.{e}.{down}.weight"] for e in range(8)])
        assert torch.equal(theirs["model.layers.1.mlp.experts.down_proj"], downs)


# Options ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("kv_heads=replicate",)])
def test_heads_fewer_than_ranks_are_repeated_never_cut(checkpoints, tmp_path, capsys, options):
    src, name = checkpoints / "llama" / "hub", "model.layers.1.self_attn.k_proj.weight"
    whole = read(src)[name]
    repeated = split(src, tmp_path, 8, *options)
    assert all(torch.equal(rank[name], whole.chunk(2)[number // 4]) for number, rank in enumerate(repeated))
    divide = ("--recipe", "tp-split", "--set", "model_parallel=8", "--set", "kv_heads=divide")
    line = refusal(capsys, "convert", src, tmp_path / "out", *divide)
    assert "2 heads of keys and values cannot be divided among 8 ranks" in line
    assert "model_parallel can be 1 or 2" in line


def test_ranks_whose_heads_were_cut_are_still_merged(checkpoints, tmp_path):
    src = checkpoints / "llama" / "hub"
    whole = read(src)
    split(src, tmp_path, 8)
    for rank in range(8):
        file = tmp_path / "ranks8" / f"model{rank}-mp8.safetensors"
        cut = {name: whole[name].chunk(8)[rank] for name in whole if ".k_proj." in name or ".v_proj." in name}
        _put(file, {name: tensor.contiguous() for name, tensor in (load_file(file) | cut).items()})
    assert run("convert", tmp_path / "ranks8", tmp_path / "again", "--recipe", "tp-merge", "--quiet") == 0
    assert_same(read(tmp_path / "again"), whole)


def fused(heads, groups, size=4, **others):
    """A plan, and a checkpoint with q, k and v in one tensor, each head all of one number."""
    counts = {"q": heads, "k": groups, "v": groups}
    rows = [torch.full((size, 6), float(100 * k + n)) for k, part in enumerate(counts) for n in range(counts[part])]
    name = "model.layers.0.self_attn.qkv_proj"
    tensors = {f"{name}.weight": torch.cat(rows), f"{name}.bias": torch.cat([row[:, 0] for row in rows])}
    config = {"num_attention_heads": heads, "num_key_value_heads": groups, "hidden_size": heads * size, **others}
    return {"model.layers.*.self_attn.qkv_proj": f"packed_colwise:{heads},{groups},{groups}"}, tensors, config


@pytest.mark.parametrize(("heads", "groups", "size"), [(8, 2, 2), (8, 2, 4), (8, 2, 8), (6, 3, 3), (4, 4, 4), (8, 1, 4)])
def test_heads_of_a_fused_tensor_are_shared_whole(tmp_path, heads, groups, size):
    plan, tensors, config = fused(heads, groups)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    src = write(tmp_path / "x", tensors, config=config)
    found = split(src, tmp_path, size, f"plan={tmp_path / 'plan.json'}")
    for rank, mine in enumerate(found):
        has = mine["model.layers.0.self_attn.qkv_proj.weight"][::4, 0].tolist()
        assert has == mine["model.layers.0.self_attn.qkv_proj.bias"][::4].tolist()
        queries = [float(n) for n in range(heads * rank // size, heads * (rank + 1) // size)]
        keys = [float(n) for n in range(groups * rank // size, max(groups * (rank + 1) // size, groups * rank // size + 1))]
        assert has == [*queries, *(100 + n for n in keys), *(200 + n for n in keys)]


def test_replicas_within_a_fused_tensor_must_be_equal(tmp_path, capsys):
    plan, tensors, config = fused(8, 2)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    src, own = write(tmp_path / "x", tensors, config=config), ("--set", f"plan={tmp_path / 'plan.json'}")
    split(src, tmp_path, 4, own[1])
    file = tmp_path / "ranks4" / "model1-mp4.safetensors"
    mine = load_file(file)
    mine["model.layers.0.self_attn.qkv_proj.weight"][-1] += 1
    _put(file, mine)
    line = refusal(capsys, "convert", tmp_path / "ranks4", tmp_path / "out", "--recipe", "tp-merge", *own)
    assert "model1-mp4.safetensors/model.layers.0.self_attn.qkv_proj.weight" in line


ATTENTION = {f"model.layers.*.self_attn.{part}_proj": "rowwise" if part == "o" else "colwise" for part in "qkvo"}
WORDS = {"model.embed_tokens": "embedding_rowwise", "lm_head": "colwise"}


@pytest.mark.parametrize(
    ("plan", "shapes", "config", "size", "told"),
    [
        (ATTENTION, {"model.layers.0.self_attn.q_proj.weight": (96, 8)}, {"num_attention_heads": 8}, 3, ["8 heads", "1, 2, 4 or 8"]),
        (ATTENTION, {"model.layers.0.self_attn.o_proj.weight": (8, 96)}, {"num_attention_heads": 8}, 6, ["8 heads", "1, 2, 4 or 8"]),
        (ATTENTION, {"model.layers.0.self_attn.q_proj.bias": (96,)}, {"n_head": 8}, 12, ["8 heads", "12 ranks"]),
        (
            ATTENTION,
            {"model.layers.0.self_attn.q_proj.weight": (96, 8), "model.layers.0.self_attn.k_proj.weight": (36, 8)},
            {"num_attention_heads": 12, "num_key_value_heads": 3},
            4,
            ["3 heads of keys and values", "1, 3, 6 or 12"],
        ),
        (ATTENTION, {"model.layers.0.self_attn.q_proj.weight": (12, 8)}, {"text_config": {"num_attention_heads": 3}}, 2, ["1 or 3"]),
        ({"h.*.attn.qkv": "colwise"}, {"h.0.attn.qkv.weight": (96, 8)}, {"num_attention_heads": 8}, 16, ["24 heads of queries"]),
        (
            {"h.*.attn.query_key_value": "colwise"},
            {"h.0.attn.query_key_value.weight": (48, 8)},
            {"num_attention_heads": 8, "num_key_value_heads": 2},
            4,
            ["2 groups of heads", "1 or 2"],
        ),
        (WORDS, {"model.embed_tokens.weight": (90, 8), "lm_head.weight": (90, 8)}, {"vocab_size": 90}, 4, ["90 words", "pad_vocab"]),
        (
            {"layers.*.experts.w": "grouped_gemm"},
            {"layers.0.experts.w": (6, 8, 8)},
            {},
            4,
            ["6 experts", "model_parallel can be 1, 2, 3 or 6"],
        ),
    ],
)
def test_what_would_be_cut_is_refused_with_the_sizes_that_fit(tmp_path, capsys, plan, shapes, config, size, told):
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    src = write(tmp_path / "x", numbered(shapes), config=config)
    own = ("--recipe", "tp-split", "--set", f"plan={tmp_path / 'plan.json'}", "--set", f"model_parallel={size}")
    line = refusal(capsys, "convert", src, tmp_path / "out", *own)
    assert all(text in line for text in told), line
    assert not (tmp_path / "out").exists()


def test_how_many_ranks_must_be_said_and_has_one_name(tmp_path, capsys):
    (tmp_path / "plan.json").write_text('{"a": "colwise"}')
    src = write(tmp_path / "x", numbered({"a.weight": (12, 4)}), config={})
    own = ("convert", src, tmp_path / "out", "--recipe", "tp-split", "--set", f"plan={tmp_path / 'plan.json'}")
    assert "--set model_parallel=..." in refusal(capsys, *own)
    assert "leave one out" in refusal(capsys, *own, "--set", "size=2", "--set", "model_parallel=2")
    for name in ("size", "model_parallel"):
        assert run(*own, "--set", f"{name}=3", "--overwrite", "--quiet") == 0
        assert len(ranks(tmp_path / "out", 3)) == 3


def test_replicated_heads_that_differ_are_refused(checkpoints, tmp_path, capsys):
    src, name = checkpoints / "llama" / "hub", "model.layers.1.self_attn.k_proj.weight"
    split(src, tmp_path, 4, "kv_heads=replicate")
    file = tmp_path / "ranks4" / "model1-mp4.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name] + 1
    _put(file, tensors)
    line = refusal(capsys, "convert", tmp_path / "ranks4", tmp_path / "out", "--recipe", "tp-merge", "--set", "kv_heads=replicate")
    assert f"model1-mp4.safetensors/{name}" in line


def _put(file, tensors):
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})


def test_the_vocabulary_is_filled_up_where_asked(tmp_path):
    shapes = {"embed_tokens.weight": (99, 8), "lm_head.weight": (99, 8), "norm.weight": (8,)}
    plan = {"embed_tokens": "embedding_rowwise", "lm_head": "colwise"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    src = write(tmp_path / "x", numbered(shapes), config={"vocab_size": 99})
    found = split(src, tmp_path, 4, f"plan={tmp_path / 'plan.json'}", "pad_vocab=16")
    whole = read(src)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert [rank[name].shape for rank in found] == [(32, 8)] * 4
        filled = torch.cat([rank[name] for rank in found])
        assert torch.equal(filled[:99], whole[name])
        assert not filled[99:].any()


@pytest.mark.parametrize(
    ("style", "blocks"), [("packed_colwise:8,2,2", (32, 8, 8)), ("packed_colwise", (24, 24)), ("packed_colwise:1", (48,))]
)
def test_fused_blocks_are_divided_each(tmp_path, style, blocks):
    (tmp_path / "plan.json").write_text(json.dumps({"layers.*.qkv": style, "layers.*.out": "packed_rowwise"}))
    src = write(
        tmp_path / "x", numbered({"layers.3.qkv.weight": (48, 6), "layers.3.qkv.bias": (48,), "layers.3.out.weight": (6, 8)}), config={}
    )
    found, whole = split(src, tmp_path, 2, f"plan={tmp_path / 'plan.json'}"), read(src)
    for name in ("layers.3.qkv.weight", "layers.3.qkv.bias"):
        for rank in range(2):
            wanted = [block.chunk(2)[rank] for block in whole[name].split(blocks)]
            assert torch.equal(found[rank][name], torch.cat(wanted))
    halves = [half.chunk(2, dim=1) for half in whole["layers.3.out.weight"].chunk(2, dim=1)]
    assert all(torch.equal(found[k]["layers.3.out.weight"], torch.cat([half[k] for half in halves], dim=1)) for k in range(2))


def test_an_odd_number_of_rows_leaves_the_last_rank_fewer(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"a": "colwise", "b": "rowwise"}))
    src = write(tmp_path / "x", numbered({"a.weight": (11, 4), "a.bias": (11,), "b.weight": (4, 11), "b.bias": (4,)}), config={})
    found = split(src, tmp_path, 4, f"plan={tmp_path / 'plan.json'}")
    assert [rank["a.weight"].shape[0] for rank in found] == [rank["a.bias"].shape[0] for rank in found] == [3, 3, 3, 2]
    assert [rank["b.weight"].shape[1] for rank in found] == [3, 3, 3, 2]
    assert all(torch.equal(rank["b.bias"], found[0]["b.bias"]) for rank in found)


@pytest.mark.parametrize("layout", ["hub", "native"])
def test_experts_go_to_ranks_whole(checkpoints, tmp_path, layout):
    """The library's own plan for experts, on its fused tensors and on those of each expert."""
    plan = {f"model.layers.*.mlp.experts.{name}": "grouped_gemm" for name in ("gate_up_proj", "down_proj")}
    plan |= {f"model.layers.*.block_sparse_moe.experts.*.{name}": "grouped_gemm" for name in ("w1", "w2", "w3")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    src = checkpoints / "mixtral" / layout
    found, whole = split(src, tmp_path, 4, f"plan={tmp_path / 'plan.json'}"), read(src)
    for number, rank in enumerate(found):
        if layout == "native":
            name = "model.layers.0.mlp.experts.gate_up_proj"
            assert torch.equal(rank[name], whole[name][2 * number : 2 * number + 2])
        else:
            mine = {int(name.split(".")[5]) for name in rank if ".experts." in name}
            assert mine == {2 * number, 2 * number + 1}


# What is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "options", "told"),
    [
        ('{"a": "diagonal"}', (), "'diagonal' is unknown"),
        ('{"a": "packed_colwise:0,1"}', (), "is unknown"),
        ('{"a": 3}', (), "expected a JSON object of names and styles"),
        ("[", (), "cannot be read as JSON"),
        ('{"elsewhere": "colwise"}', (), "names none of these tensors"),
        ('{"a": "colwise"}', ("size=0",), "model_parallel=0"),
        ('{"a": "colwise"}', ("size=7",), "a.weight: 12 elements cannot be divided among 7 ranks"),
        ('{"a": "packed_colwise:8,2,1"}', (), "not in proportion"),
        ('{"a": "packed_colwise:3,1"}', ("size=4",), "cannot be divided among 4 ranks"),
        ('{"layers.*.experts.*.w": "grouped_gemm"}', (), "how many experts there are is not known"),
        ('{"a": "grouped_gemm"}', (), "its name has no number of one"),
    ],
)
def test_plans_that_do_not_fit_are_refused(tmp_path, capsys, plan, options, told):
    (tmp_path / "plan.json").write_text(plan)
    src = write(tmp_path / "x", numbered({"a.weight": (12, 4), "layers.0.experts.0.w.weight": (4, 4)}), config={})
    own = [text for option in (f"plan={tmp_path / 'plan.json'}", *(options or ("size=2",))) for text in ("--set", option)]
    assert told in refusal(capsys, "convert", src, tmp_path / "out", "--recipe", "tp-split", *own)
    assert not (tmp_path / "out").exists()


def test_ranks_that_do_not_fit_together_are_refused(checkpoints, tmp_path, capsys):
    split(checkpoints / "llama" / "hub", tmp_path, 2)
    (tmp_path / "ranks2" / "model1-mp2.safetensors").unlink()
    assert "model1-mp2.safetensors/" in refusal(capsys, "convert", tmp_path / "ranks2", tmp_path / "out", "--recipe", "tp-merge")
    write(tmp_path / "mixed", {"a": random_tensor(2)}, config={})
    assert "tp-merge" in refusal(capsys, "convert", tmp_path / "mixed", tmp_path / "out", "--recipe", "tp-merge")


def test_whole_tensors_that_differ_between_ranks_are_refused(checkpoints, tmp_path, capsys):
    split(checkpoints / "llama" / "hub", tmp_path, 2)
    file = tmp_path / "ranks2" / "model1-mp2.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    _put(file, tensors)
    line = refusal(capsys, "convert", tmp_path / "ranks2", tmp_path / "out", "--recipe", "tp-merge")
    assert "model1-mp2.safetensors/model.norm.weight" in line


# DeepSeek's own layout -------------------------------------------------------------------------------------------------

# ``mapping`` of DeepSeek-V3's inference/convert.py: names there, and the axis that ranks divide.
THEIRS = {
    "embed_tokens": ("embed", 0), "input_layernorm": ("attn_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0), "q_a_proj": ("wq_a", None), "q_a_layernorm": ("q_norm", None), "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None), "kv_a_layernorm": ("kv_norm", None), "kv_b_proj": ("wkv_b", 0), "o_proj": ("wo", 1),
    "gate": ("gate", None), "gate_proj": ("w1", 0), "down_proj": ("w2", 1), "up_proj": ("w3", 0), "norm": ("norm", None),
    "lm_head": ("head", 0),
}  # fmt: skip


def theirs(tensors, layers, experts, size):
    """The tensors of each rank, as the loop of that script makes them."""
    found = [{} for _ in range(size)]
    for name, tensor in tensors.items():
        parts = name.removeprefix("model.").split(".")
        if parts[0] == "layers" and int(parts[1]) >= layers:
            continue
        module, axis = THEIRS[parts[-2]]
        last = {"weight_scale_inv": "scale", "e_score_correction_bias": "bias"}.get(parts[-1], parts[-1])
        own = ".".join([*({"self_attn": "attn", "mlp": "ffn"}.get(part, part) for part in parts[:-2]), module, last])
        for rank in range(size):
            if "experts" in parts:
                if int(parts[-3]) * size // experts == rank:
                    found[rank][own] = tensor
            else:
                found[rank][own] = tensor if axis is None else tensor.chunk(size, dim=axis)[rank]
    return found


def deepseek(*, low_rank=True, fp8=True, predicts=True):
    """Numbers in the names and shapes of a DeepSeek-V3 of three layers, and its config."""
    config = {"num_hidden_layers": 2, "n_routed_experts": 8, "vocab_size": 64, "quantization_config": {"quant_method": "fp8"}}
    matrices = {"self_attn.kv_a_proj_with_mqa": (24, 64), "self_attn.kv_b_proj": (64, 16), "self_attn.o_proj": (64, 32)}
    matrices |= {"self_attn.q_a_proj": (16, 64), "self_attn.q_b_proj": (64, 16)} if low_rank else {"self_attn.q_proj": (64, 64)}
    norms = {"input_layernorm": 64, "post_attention_layernorm": 64, "self_attn.kv_a_layernorm": 16}
    norms |= {"self_attn.q_a_layernorm": 16} if low_rank else {}
    shapes = {"model.embed_tokens.weight": (64, 64), "model.norm.weight": (64,), "lm_head.weight": (64, 64)}
    for i in range(3 if predicts else 2):
        mine = dict(matrices)
        for part in ("mlp",) if i == 0 else ("mlp.shared_experts", *(f"mlp.experts.{e}" for e in range(8))):
            mine |= {f"{part}.gate_proj": (32, 64), f"{part}.up_proj": (32, 64), f"{part}.down_proj": (64, 32)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in mine.items()}
        shapes |= {f"model.layers.{i}.{name}.weight": (size,) for name, size in norms.items()}
        if fp8:
            shapes |= {f"model.layers.{i}.{name}.weight_scale_inv": (rows // 8, columns // 8) for name, (rows, columns) in mine.items()}
        if i:
            shapes |= {f"model.layers.{i}.mlp.gate.weight": (8, 64), f"model.layers.{i}.mlp.gate.e_score_correction_bias": (8,)}
    if predicts:
        shapes |= {"model.layers.2.eh_proj.weight": (64, 128), "model.layers.2.shared_head.norm.weight": (64,)}
    return numbered(shapes), config


@pytest.mark.sampled(3)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("form", [{}, {"low_rank": False}, {"fp8": False}])
def test_deepseeks_own_layout_is_that_of_its_script(tmp_path, size, form):
    tensors, config = deepseek(**form)
    src = write(tmp_path / "x", tensors, config=config, shards=2)
    size_option = ("--set", f"model_parallel={size}", "--quiet")
    assert run("convert", src, tmp_path / "mp", "--recipe", "deepseek3-hf2mp", *size_option) == 0
    for found, wanted in zip(ranks(tmp_path / "mp", size), theirs(tensors, 2, 8, size), strict=True):
        assert_same(found, wanted)
    assert run("convert", tmp_path / "mp", tmp_path / "back", "--recipe", "deepseek3-mp2hf", "--quiet") == 0
    assert_same(read(tmp_path / "back"), {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.2.")})


def test_a_number_of_ranks_that_was_not_given_is_noted_and_cuts_no_heads(tmp_path, capsys):
    tensors, config = deepseek(predicts=False, fp8=False)
    src = write(tmp_path / "x", tensors, config={**config, "num_attention_heads": 4})
    made = streamconv.plan(src, tmp_path / "mp", recipe="deepseek3-hf2mp", options={"model_parallel": 4}, max_memory="4GB")
    assert not made.notes
    assert "4 heads cannot be divided among 8 ranks" in refusal(capsys, "plan", src, tmp_path / "mp", "--recipe", "deepseek3-hf2mp")
    src = write(tmp_path / "y", tensors, config={**config, "num_attention_heads": 8})
    made = streamconv.plan(src, tmp_path / "mp", recipe="deepseek3-hf2mp", max_memory="4GB")
    assert made.notes == ("8 ranks, which --set model_parallel=N changes",)


def test_the_account_tells_parts_from_names(tmp_path):
    tensors, config = deepseek(predicts=False)
    src = write(tmp_path / "x", tensors, config=config)
    options = {"model_parallel": 2}
    made = streamconv.plan(src, tmp_path / "mp", recipe="deepseek3-hf2mp", options=options, max_memory="4GB")
    whole = [row for row in made.mapping if row.sources[0].endswith(("norm.weight", "a_proj.weight")) or ".experts." in row.target]
    assert all(not row.layout for row in whole)
    part = next(row for row in made.mapping if row.target == "model1-mp2.safetensors/embed.weight")
    assert part.layout == "part 1 of 2"
    assert 0 < made.account.renamed < made.account.tensors


def test_deepseeks_layout_is_refused_where_its_script_would_fail(tmp_path, capsys):
    tensors, config = deepseek(predicts=False)
    src = write(tmp_path / "x", tensors, config=config)
    line = refusal(capsys, "convert", src, tmp_path / "mp", "--recipe", "deepseek3-hf2mp", "--set", "model_parallel=3")
    assert "cannot be divided among 3 ranks" in line
    tensors["model.layers.1.mlp.experts.3.gate_proj.extra"] = random_tensor(3)
    write(tmp_path / "y", tensors, config=config)
    assert "no rule for it" in refusal(capsys, "convert", tmp_path / "y", tmp_path / "mp", "--recipe", "deepseek3-hf2mp")
