"""The doctor: each of the seeded defects is found, and nothing is found where all is well."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from checkpoint_files import run, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeded_defects import CONFIG, DEFECTS, FIRST, INDEX, edit_json, edit_tensors, llama, no_head

from streamconv.diagnose.doctor import examine
from streamconv.text import one_line


def test_health(healthy, capsys):
    found = examine(healthy, data=True)
    assert found.findings == []
    assert found.healthy
    assert found.dtypes == {"bfloat16": 48}
    assert run("doctor", healthy) == 0
    assert "healthy" in capsys.readouterr().out
    assert run("doctor", healthy / FIRST, "--quiet") in (0, 1)


@pytest.mark.sampled(3)
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
    stem, (rows, columns) = name.removesuffix("weight"), tensor.shape
    float8, words = tensor.to(torch.float8_e4m3fn), torch.zeros(columns // 8, rows, dtype=torch.int32)
    state = torch.tensor([*json.dumps({"shape": [rows, columns], "blocksize": tensor.numel(), "dtype": "bfloat16"}).encode()]).byte()
    codes = torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)
    zeros, scales = torch.zeros(1, -(-rows // 8), dtype=torch.int32), torch.ones(1, rows, dtype=torch.float16)
    stored = {
        "bitsandbytes": {name: codes, f"{name}.absmax": torch.ones(1), f"{name}.quant_state.bitsandbytes__nf4": state},
        "gptq": {f"{stem}qweight": words, f"{stem}qzeros": zeros, f"{stem}scales": scales},
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
    more = {"gptq": {"bits": 4}, "compressed-tensors": {"config_groups": {"all": {"weights": {"strategy": "channel"}}}}}
    section = {"quant_method": method, **more.get(method, {})}
    config = CONFIG if method == "modelopt" else {**CONFIG, "quantization_config": section}
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
