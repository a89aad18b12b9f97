"""The doctor: each of the seeded defects is found, and nothing is found where all is well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import random_tensor, run, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from streamconv.diagnose.doctor import examine
from streamconv.text import one_line

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "tie_word_embeddings": False,
}


def llama() -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,), "lm_head.weight": (16, 8)}
    for layer in range(5):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{name}_proj.weight": (rows, 8) for name, rows in (("q", 8), ("k", 4), ("v", 4), ("o", 8))}
        shapes |= {f"{stem}.mlp.{name}_proj.weight": (12, 8) for name in ("gate", "up")} | {f"{stem}.mlp.down_proj.weight": (8, 12)}
        shapes |= {f"{stem}.{name}.weight": (8,) for name in ("input_layernorm", "post_attention_layernorm")}
    return {name: random_tensor(*shape, dtype=torch.bfloat16, seed=k) for k, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def healthy(tmp_path):
    folder = write(tmp_path / "model", llama(), shards=3, config=CONFIG)
    (folder / "tokenizer.json").write_text("{}")
    return folder


FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def edit_json(path: Path, **values: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (data | values).items() if value is not None}))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_index(folder: Path, change) -> None:
    data = json.loads((folder / INDEX).read_text())
    change(data["weight_map"])
    (folder / INDEX).write_text(json.dumps(data))


def set_header(path: Path, change) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def shift(header: dict) -> None:
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin - 2, end - 2]


def gap(header: dict) -> None:
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin + 2, end + 2]


def narrow(folder: Path) -> None:
    edit_tensors(folder / FIRST, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].to(torch.float8_e4m3fn)}))


def drop_layer(folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        edit_tensors(file, lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name])
    edit_index(folder, lambda m: [m.pop(name) for name in list(m) if ".layers.2." in name])


def drop_one(folder: Path) -> None:
    name = "model.layers.3.input_layernorm.weight"
    for file in sorted(folder.glob("*.safetensors")):
        edit_tensors(file, lambda t: t.pop(name, None))
    edit_index(folder, lambda m: m.pop(name))


def reshape_one(folder: Path) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    for file in sorted(folder.glob("*.safetensors")):
        edit_tensors(file, lambda t: t.update({name: t[name][:4].clone()}) if name in t else None)


def no_head(folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        edit_tensors(file, lambda t: t.pop("lm_head.weight", None))
    edit_index(folder, lambda m: m.pop("lm_head.weight"))


DEFECTS = {
    "a truncated shard": (lambda f: (f / LAST).write_bytes((f / LAST).read_bytes()[:-5]), "bytes are missing"),
    "bytes behind the data": (lambda f: (f / LAST).write_bytes((f / LAST).read_bytes() + b"junk"), "belong to no tensor"),
    "a header that is no JSON": (lambda f: (f / FIRST).write_bytes(b"\x10\0\0\0\0\0\0\0{" + b"x" * 40), "not JSON"),
    "overlapping tensors": (lambda f: set_header(f / FIRST, shift), "overlaps"),
    "a gap between tensors": (lambda f: set_header(f / FIRST, gap), "gap"),
    "an LFS pointer": (lambda f: (f / FIRST).write_text("version https://git-lfs.github.com/spec/v1\n"), "LFS pointer"),
    "a missing shard": (lambda f: (f / LAST).unlink(), "which is not there"),
    "a missing shard without index": (lambda f: [(f / INDEX).unlink(), (f / FIRST).unlink()], "2 of 3 are there"),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("{"), "cannot be read"),
    "an index without weight_map": (lambda f: (f / INDEX).write_text("{}"), "cannot be read"),
    "a tensor that is not where the index says": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": LAST})),
        "does not hold it",
    ),
    "a tensor that the index does not name": (lambda f: edit_index(f, lambda m: m.pop("model.norm.weight")), "does not name it"),
    "a stale shard": (lambda f: save_file({"old": torch.ones(2)}, f / "model-00001-of-00002.safetensors"), "may be of another version"),
    "a tensor in two files": (
        lambda f: [(f / INDEX).unlink(), save_file({"model.norm.weight": torch.ones(8)}, f / "more.safetensors")],
        "model.norm.weight: it is in",
    ),
    "a stale single file": (lambda f: save_file({"a": torch.ones(1)}, f / "model.safetensors"), "is there beside it"),
    "a wrong total_size": (lambda f: edit_json(f / INDEX, metadata={"total_size": 7}), "total_size says 7"),
    "an interrupted conversion": (lambda f: (f / "model-00004-of-00004.safetensors.partial").write_bytes(b""), "interrupted conversion"),
    "an empty shard": (lambda f: save_file({}, f / "model-extra.safetensors"), "holds no tensor"),
    "a missing layer": (drop_layer, "layer 2 is missing"),
    "a layer that lacks a tensor": (drop_one, "all other layers have it"),
    "a layer of another shape": (reshape_one, "the others (8, 12)"),
    "too few layers for the config": (lambda f: edit_json(f / "config.json", num_hidden_layers=6), "config.json says 6"),
    "another vocabulary": (lambda f: edit_json(f / "config.json", vocab_size=20), "vocab_size says 20"),
    "another width": (lambda f: edit_json(f / "config.json", hidden_size=16), "hidden_size says 16"),
    "other heads": (lambda f: edit_json(f / "config.json", num_key_value_heads=4), "follow from num_key_value_heads"),
    "another intermediate size": (lambda f: edit_json(f / "config.json", intermediate_size=24 * 3), "intermediate_size"),
    "no head where none is tied": (no_head, "tie_word_embeddings is false"),
    "another dtype": (lambda f: edit_json(f / "config.json", dtype="float32"), "the tensors are bfloat16"),
    "fp8 without a word": (narrow, "no quantization_config"),
    "fp8 in words only": (lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "fp8"}), "no tensor is"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "a config without model_type": (lambda f: edit_json(f / "config.json", model_type=None), "lacks model_type"),
    "code that is not there": (lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "modeling_x.X"}), "modeling_x.py"),
    "sizes that are no numbers": (lambda f: edit_json(f / "config.json", hidden_size="8"), "hidden_size is '8', not a whole number"),
}


def test_health(healthy, capsys):
    found = examine(healthy, data=True)
    assert found.findings == []
    assert found.healthy
    assert found.dtypes == {"bfloat16": 48}
    assert run("doctor", healthy) == 0
    assert "healthy" in capsys.readouterr().out
    assert run("doctor", healthy / FIRST, "--quiet") in (0, 1)


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_found(defect, healthy, capsys):
    damage, part = DEFECTS[defect]
    damage(healthy)
    found = examine(healthy)
    assert not found.healthy
    assert part in "\n".join(str(finding) for finding in found.findings if finding.problem), found.findings
    assert run("doctor", healthy) == 1
    assert part in capsys.readouterr().out
    assert run("doctor", healthy, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["healthy"]
    assert all(row["what"] and row["where"] and row["why"] and row["do"] for row in told["findings"])


@pytest.mark.parametrize(
    ("value", "part"), [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (0.0, "all values are zero"), (2.0, "are 2")]
)
def test_numbers_are_looked_at_on_request(value, part, healthy):
    edit_tensors(healthy / FIRST, lambda t: t["model.embed_tokens.weight"].fill_(value))
    assert examine(healthy).healthy
    (finding,) = examine(healthy, data=True).findings
    assert part in finding.what
    assert finding.where == "model.embed_tokens.weight"


def test_what_cannot_be_a_checkpoint(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run("doctor", tmp_path / "empty") == 2
    assert run("doctor", tmp_path / "nothing") == 2
    assert capsys.readouterr().err.count("streamconv: error:") == 2


def test_a_tied_model_is_healthy(healthy):
    no_head(healthy)
    edit_json(healthy / "config.json", tie_word_embeddings=True)
    assert examine(healthy).healthy


def test_no_tokenizer_is_worth_a_note(healthy, capsys):
    (healthy / "tokenizer.json").unlink()
    (note,) = examine(healthy).findings
    assert (note.what, note.problem) == ("no tokenizer file is there", False)
    assert run("doctor", healthy) == 0
    assert "no tokenizer file" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["unet", "2_Dense", "timm"])
def test_configs_of_other_libraries_name_no_class(name, tmp_path):
    config = {
        "unet": {"_class_name": "UNet2DModel", "_diffusers_version": "0.30"},
        "2_Dense": {"in_features": 8, "out_features": 8, "activation_function": "torch.nn.modules.activation.Tanh"},
        "timm": {"architecture": "resnet18", "num_classes": 10},
    }[name]
    assert examine(write(tmp_path / name, {"linear.weight": torch.ones(8, 8)}, config=config)).healthy


def quantized(method: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A matrix as the libraries of such a method store it."""
    stem, rows = name.removesuffix("weight"), tensor.shape[0]
    float8, words = tensor.to(torch.float8_e4m3fn), torch.zeros(2, rows, dtype=torch.int32)
    stored = {
        "bitsandbytes": {name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(1)},
        "gptq": {f"{stem}qweight": words, f"{stem}scales": torch.ones(1, rows, dtype=torch.float16)},
        "fp8": {name: float8, f"{name}_scale_inv": torch.ones(1, 1)},
        "compressed-tensors": {name: float8, f"{name}_scale": torch.ones(rows, 1)},
        "modelopt": {name: float8, f"{name}_scale": torch.ones(())},
    }
    return stored[method]


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "compressed-tensors", "modelopt"])
def test_quantized_checkpoints_are_healthy(method, tmp_path):
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in llama().items():
        tensors |= quantized(method, name, tensor) if "_proj" in name else {name: tensor}
    config = CONFIG if method == "modelopt" else {**CONFIG, "quantization_config": {"quant_method": method}}
    folder = write(tmp_path / "model", tensors, config=config)
    if method == "modelopt":
        (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert examine(folder).healthy, examine(folder).findings


# A config may say anything -------------------------------------------------------------------------------------------

KEYS = (
    "model_type", "architectures", "text_config", "auto_map", "vocab_size", "hidden_size", "n_embd", "d_model", "num_hidden_layers",
    "n_layer", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim", "num_local_experts", "n_routed_experts",
    "num_experts", "qk_nope_head_dim", "num_nextn_predict_layers", "tie_word_embeddings", "dtype", "torch_dtype", "quantization_config",
    "compression_config", "quantization",
)  # fmt: skip
NUMBERS = st.integers() | st.sampled_from([0, -1, 2**63, 10**400, 0.5]) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.sampled_from(["", "llama", "8", "\x1b[2J", "a" * 5000, "x\0y"]) | st.text(max_size=5)
odd = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "quant_method", "AutoModel"]), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=st.dictionaries(st.sampled_from(KEYS), odd, max_size=6))
def test_a_config_may_say_anything(config, healthy):
    (healthy / "config.json").write_text(json.dumps({**CONFIG, **config}))
    for finding in examine(healthy).findings:
        assert one_line(finding).isprintable()


@pytest.mark.parametrize("value", ["[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900])
@pytest.mark.parametrize("key", KEYS)
def test_a_config_may_be_deep(key, value, healthy):
    (healthy / "config.json").write_text(json.dumps({**CONFIG, key: "VALUE"}).replace('"VALUE"', value))
    examine(healthy)


def test_an_index_may_say_anything(healthy):
    for change in (
        {"metadata": 5},
        {"metadata": {"total_size": [1]}},
        {"metadata": {"total_size": "9"}},
        {"weight_map": 3},
        {"weight_map": {"a": 1}},
    ):
        before = (healthy / INDEX).read_text()
        (healthy / INDEX).write_text(json.dumps({**json.loads(before), **change}))
        examine(healthy)
        (healthy / INDEX).write_text(before)


def test_one_file(healthy, tmp_path):
    tensors = llama()
    folder = write(tmp_path / "single", tensors, config=CONFIG)
    shutil.copy(healthy / "tokenizer.json", folder)
    assert examine(folder).healthy
    assert examine(folder / "model.safetensors").healthy


def test_a_head_that_is_stored_though_it_is_tied_is_worth_a_note(healthy):
    edit_json(healthy / "config.json", tie_word_embeddings=True)
    found = examine(healthy)
    assert found.healthy
    (note,) = found.findings
    assert (note.where, note.problem) == ("lm_head.weight", False)
