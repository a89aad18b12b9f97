"""Meta's, Mistral's and Mixtral's own checkpoints: what transformers computes with the results, against the original models' arithmetic."""

import json
import math

import pytest
import torch
from checkpoint_files import assert_same, read, run
from meta_models import (
    DIM,
    mistral_params,
    mixtral,
    mixtral_params,
    params,
    ranks,
    spread,
    whole,
    write_consolidated,
    write_ranks,
)  # fmt: skip
from safetensors.torch import load_file
from torch.nn.functional import embedding, silu

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TOKENS = torch.tensor([[1, 5, 7, 9, 33, 2, 40]])


def load(transformers, folder):
    """The model in a folder, after checking that its tensors are those that the model has."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def normed(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def turned(x, frequencies):
    """Pairs of neighbouring channels as complex numbers, turned by position times frequency, as Meta's and Mistral's code has it."""
    angles = torch.outer(torch.arange(x.shape[1]).float(), frequencies)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]).flatten(-2)


def original_logits(tensors, heads, kv, theta, experts=0, scale=lambda frequencies: frequencies):
    """The logits of the original model, whose ``experts`` are blocks of rows in one matrix."""
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    x = embedding(TOKENS, tensors["tok_embeddings.weight"])
    length = x.shape[1]
    mask = torch.full((length, length), -math.inf).triu(1)
    for i in range(1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))):
        part = {name.removeprefix(f"layers.{i}."): tensor for name, tensor in tensors.items() if name.startswith(f"layers.{i}.")}
        h = normed(x, part["attention_norm.weight"])
        q, k, v = (
            (h @ part[f"attention.{name}.weight"].T).unflatten(-1, (count, -1)) for name, count in (("wq", heads), ("wk", kv), ("wv", kv))
        )
        d = q.shape[-1]
        frequencies = scale(1.0 / theta ** (torch.arange(0, d, 2).float() / d))
        q, k, v = (t.transpose(1, 2) for t in (turned(q, frequencies), turned(k, frequencies), v))
        k, v = (t.repeat_interleave(heads // kv, dim=1) for t in (k, v))
        seen = torch.softmax(q @ k.transpose(2, 3) / d**0.5 + mask, dim=-1) @ v
        x = x + seen.transpose(1, 2).flatten(2) @ part["attention.wo.weight"].T
        h = normed(x, part["ffn_norm.weight"])
        if not experts:
            w1, w2, w3 = (part[f"feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
            x = x + (silu(h @ w1.T) * (h @ w3.T)) @ w2.T
            continue
        best, chosen = (h @ part["block_sparse_moe.gate.weight"].T).topk(2)
        weights = torch.zeros(*h.shape[:2], experts).scatter(2, chosen, best.softmax(-1))
        w1, w2, w3 = (part[f"block_sparse_moe.{name}"].unflatten(0, (experts, -1)) for name in ("w1", "w2", "w3"))
        for e in range(experts):
            x = x + weights[..., e, None] * ((silu(h @ w1[e].T) * (h @ w3[e].T)) @ w2[e])
    return normed(x, tensors["norm.weight"]) @ tensors["output.weight"].T


def tame(tensors):
    """Weights of a size with which logits are no noise."""
    return {name: tensor * (0.2 if tensor.ndim == 2 else 1) for name, tensor in tensors.items()}


def convert(source, target, recipe, *options):
    assert run("convert", source, target, "--recipe", recipe, "--quiet", *(p for o in options for p in ("--set", o))) == 0


def assert_close(found, wanted):
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(("version", "theta"), [("1", 1e4), ("2", 1e6), ("3", 5e5)])
@pytest.mark.parametrize(("heads", "kv", "count"), [(4, 4, 1), (4, 2, 2), (4, 1, 4), (4, 2, 4)])
def test_llama(heads, kv, count, version, theta, transformers, tmp_path):
    tensors = tame(whole(heads, kv, dtype=torch.float32))
    parts = ranks(tensors, count, by_rows=version == "3", copies=max(1, count // kv))
    source = write_ranks(tmp_path / "source", parts, params(heads, kv, rope_theta=theta))
    convert(source, tmp_path / "hf", "llama-meta2hf", f"llama_version={version}")
    assert_close(logits(load(transformers, tmp_path / "hf")), original_logits(tensors, heads, kv, theta))


def scaled(factor):
    """The frequencies of Llama 3.1 and 3.2, as ``apply_scaling`` of Meta's code has them."""

    def scale(frequencies):
        found = []
        for frequency in frequencies.tolist():
            wavelength = 2 * math.pi / frequency
            smooth = (8192 / wavelength - 1) / 3
            between = (1 - smooth) * frequency / factor + smooth * frequency
            found.append(frequency if wavelength < 2048 else frequency / factor if wavelength > 8192 else between)
        return torch.tensor(found)

    return scale


@pytest.mark.parametrize(("version", "factor"), [("3.1", 8), ("3.2", 32), ("Guard-3", 8)])
def test_llama_with_scaled_frequencies(version, factor, transformers, tmp_path):
    tensors = tame(whole(2, 1, dtype=torch.float32))
    tied = version == "3.2"
    tensors |= {"output.weight": tensors["tok_embeddings.weight"].clone()} if tied else {}
    source = write_ranks(tmp_path / "source", ranks(tensors, 1), params(2, 1, rope_theta=5e5, use_scaled_rope=True))
    convert(source, tmp_path / "hf", "llama-meta2hf", f"llama_version={version}")
    model = load(transformers, tmp_path / "hf")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    frequencies = 1.0 / 5e5 ** (torch.arange(0, 16, 2).float() / 16)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, scaled(factor)(frequencies))
    assert not torch.equal(scaled(factor)(frequencies), frequencies)
    assert_close(logits(model), original_logits(tensors, 2, 1, 5e5, scale=scaled(factor)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("heads", "kv", "count"), [(4, 4, 2), (4, 2, 1), (4, 1, 2)])
def test_what_transformers_saves_of_llama(heads, kv, count, tied, transformers, tmp_path):
    sizes = {"hidden_size": DIM, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 48, "rms_norm_eps": 1e-5}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied)
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    convert(tmp_path / "saved", tmp_path / "meta", "llama-hf2meta", f"model_parallel={count}", "embedding=columns")
    files = sorted((tmp_path / "meta").glob("*.pth"))
    parts = [torch.load(file, weights_only=True, mmap=True) for file in files]
    assert len(parts) == count
    columns = (".wo.", ".w2.", "tok_embeddings.")
    shared = {name: [part[name] for part in parts] for name in parts[0]}
    if count > kv:
        shared |= {name: found[:: count // kv] for name, found in shared.items() if ".wk." in name or ".wv." in name}
    tensors = {
        name: found[0] if found[0].ndim == 1 else torch.cat(found, dim=int(any(column in name for column in columns)))
        for name, found in shared.items()
    }
    assert_close(original_logits(tensors, heads, kv, 1e4), logits(model))
    convert(tmp_path / "meta", tmp_path / "back", "llama-meta2hf", f"tied={tied}")
    assert_same(read(tmp_path / "back"), read(tmp_path / "saved"))
    assert torch.equal(logits(load(transformers, tmp_path / "back")), logits(load(transformers, tmp_path / "saved")))


@pytest.mark.parametrize("head_dim", [8, 12])
@pytest.mark.parametrize("count", [0, 2])
def test_mistral(head_dim, count, transformers, tmp_path):
    tensors = tame(whole(4, 2, head_dim=head_dim, dtype=torch.float32))
    config = mistral_params(4, 2, head_dim=head_dim)
    source = tmp_path / "source"
    if count:
        write_ranks(source, ranks(tensors, count), config, "consolidated.{}.pth")
    else:
        write_consolidated(source, tensors, config)
    convert(source, tmp_path / "hf", "mistral-original2hf")
    model = load(transformers, tmp_path / "hf")
    assert type(model).__name__ == "MistralForCausalLM"
    assert_close(logits(model), original_logits(tensors, 4, 2, 1e6))
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "back", "mistral-hf2original")
    assert_same(load_file(tmp_path / "back" / "consolidated.safetensors"), tensors)
    assert json.loads((tmp_path / "back" / "params.json").read_text()) == config


def test_mixtral(transformers, tmp_path):
    own, _ = mixtral()
    tensors = {name: tensor.float() * (0.2 if tensor.ndim == 2 else 1) for name, tensor in own.items()}
    source = write_ranks(tmp_path / "source", spread(tensors, 8), mixtral_params(), "consolidated.{:02}.pt")
    convert(source, tmp_path / "hf", "mixtral-original2hf")
    model = load(transformers, tmp_path / "hf")
    assert type(model).__name__ == "MixtralForCausalLM"
    assert_close(logits(model), original_logits(tensors, 4, 2, 1e6, experts=4))
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "back", "mixtral-hf2original")
    found = {}
    for file in (tmp_path / "back").glob("*.pt"):
        found |= torch.load(file, weights_only=True)
    assert_same(found, tensors)
    assert json.loads((tmp_path / "back" / "params.json").read_text()) == mixtral_params(num_experts_per_tok=2)
