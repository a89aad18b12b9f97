"""``tokenizer_source: base``: rows of embeddings and heads by the tokens of the base's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same, read, write
from merged_models import CONFIG, added, largest, linear, merged, models, refused

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LINEAR = "models: [{model: '{m1}', parameters: {weight: 0.3}}, {model: '{m0}', parameters: {weight: 0.6}}]\nbase_model: '{m0}'\n"
LINEAR += "merge_method: linear\ntokenizer_source: base\n"
TIES = "models: [{model: '{m1}', parameters: {weight: 0.3, density: 0.4}}]\nbase_model: '{m0}'\n"
TIES += "merge_method: ties\ntokenizer_source: base\n"


def tokenizer(folder: Path, tokens: str, added: str = "") -> None:
    """Of tokens of a character each, the last ones added."""
    entries = [{"id": len(tokens) + k, "content": token} for k, token in enumerate(added)]
    said = {"model": {"type": "BPE", "vocab": {token: k for k, token in enumerate(tokens)}, "merges": []}, "added_tokens": entries}
    (folder / "tokenizer.json").write_text(json.dumps(said))


@pytest.fixture
def two(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two models of 11 rows, of which 9 and 10 are tokens'; and the second one's tensors with the rows of the first one's tokens."""
    first, second = models(tmp_path, 2, vocab_size=11)
    tokenizer(tmp_path / "m0", "abcdefg", "<>")
    tokenizer(tmp_path / "m1", "bcxadef", ">yz")
    base = {name: tensor[:9] if name in (EMBEDDING, HEAD) else tensor for name, tensor in first.items()}
    other = dict(second)
    for name in (EMBEDDING, HEAD):
        rows = [second[name][k] if k >= 0 else base[name][number] for number, k in enumerate((3, 0, 1, 4, 5, 6, -1, -1, 7))]
        other[name] = torch.stack(rows)
    return base, other


def test_rows_go_by_tokens(two: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]], tmp_path: Path) -> None:
    base, other = two
    assert_same(merged(tmp_path, LINEAR), {name: linear([other[name], base[name]], [0.3, 0.6]) for name in base})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 9
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "m0" / "tokenizer.json").read_bytes()
    wanted = {}
    for name in base:
        wanted[name] = added(base[name], [other[name]], [0.3], [largest(other[name] - base[name], 0.4)], normalize=True, elects=True)
    assert_same(merged(tmp_path, TIES), wanted)


def test_tokenizers_that_do_not_fit(
    two: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer(tmp_path / "m1", "abcdefghijk")
    tensors = read(tmp_path / "m1")
    config = json.loads((tmp_path / "m1" / "config.json").read_text())
    write(tmp_path / "m1", {**tensors, HEAD: tensors[HEAD][:5]}, config=config)
    line = refused(tmp_path, LINEAR, capsys)
    assert f"FILE:4: {HEAD} of FOLDER/m1 is bfloat16[5, 6], and its tokenizer has token 6" in line
    write(tmp_path / "m1", tensors, config=config)
    (tmp_path / "m1" / "tokenizer.json").unlink()
    base, _ = two
    made = merged(tmp_path, LINEAR)
    assert torch.equal(made[HEAD], linear([tensors[HEAD][:9], base[HEAD]], [0.3, 0.6]))
    (tmp_path / "m0" / "tokenizer.json").unlink()
    assert "FILE:4: tokenizer_source: base needs tokenizer.json beside FOLDER/m0" in refused(tmp_path, LINEAR, capsys)


@pytest.mark.parametrize("tied", ["m0", "m1"])
def test_an_embedding_that_is_a_head_takes_rows_of_the_other_head(tied: str, tmp_path: Path) -> None:
    both = dict(zip(("m0", "m1"), models(tmp_path, 2, vocab_size=11), strict=True))
    del both[tied][HEAD]
    write(tmp_path / tied, both[tied], config={**CONFIG, "vocab_size": 11, "tie_word_embeddings": True})
    tokenizer(tmp_path / "m0", "abc")
    tokenizer(tmp_path / "m1", "bxa")
    made = merged(tmp_path, LINEAR)
    for name in (EMBEDDING, HEAD):
        base, other = (both[model].get(name, both[model][EMBEDDING]) for model in ("m0", "m1"))
        assert torch.equal(made[name], linear([torch.stack([other[2], other[0], base[2]]), base[:3]], [0.3, 0.6])), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
