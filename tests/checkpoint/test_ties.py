"""Which name of a tensor is kept where it is stored once: the one that transformers' save_pretrained keeps."""

import json
import subprocess
import sys

import pytest
import torch
from checkpoint_files import read, run

from streamconv.checkpoint.opening import open_checkpoint
from streamconv.checkpoint.ties import find_ties
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.formats import Extent, Source

# The first name is kept; the others are what models call the same tensor, here in the order of the alphabet.
GROUPS = {
    "Llama": ["model.embed_tokens.weight", "lm_head.weight"],
    "GPT-2": ["transformer.wte.weight", "lm_head.weight"],
    "T5": ["shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight"],
    "T5's classifier": ["transformer.shared.weight", "transformer.decoder.embed_tokens.weight", "transformer.encoder.embed_tokens.weight"],
    "BART, Marian, Pegasus": ["model.shared.weight", "lm_head.weight", "model.decoder.embed_tokens.weight"],
    "BERT": ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
    "BERT's bias": ["cls.predictions.bias", "cls.predictions.decoder.bias"],
    "ALBERT": ["albert.embeddings.word_embeddings.weight", "predictions.decoder.weight"],
    "RoBERTa's bias": ["lm_head.bias", "lm_head.decoder.bias"],
    "DistilBERT": ["distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"],
    "Whisper": ["model.decoder.embed_tokens.weight", "proj_out.weight"],
    "TrOCR": ["model.decoder.embed_tokens.weight", "output_projection.weight"],
    "ProphetNet": ["prophetnet.word_embeddings.weight", "lm_head.weight", "prophetnet.decoder.word_embeddings.weight"],
    "VLMs": ["model.language_model.embed_tokens.weight", "lm_head.weight"],
    "VLMs of before": ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"],
    "ModernBERT": ["model.embeddings.tok_embeddings.weight", "decoder.weight"],
    "XLNet": ["transformer.word_embedding.weight", "lm_loss.weight"],
    "GPT-NeoX Japanese": ["gpt_neox_japanese.embed_in.weight", "embed_out.weight"],
    "Meta's own": ["tok_embeddings.weight", "output.weight"],
    "InternLM2": ["model.tok_embeddings.weight", "output.weight"],
    "ChatGLM": ["transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"],
    "OLMo": ["model.transformer.wte.weight", "model.transformer.ff_out.weight"],
    "RWKV": ["rwkv.embeddings.weight", "head.weight"],
    "XLM": ["transformer.embeddings.weight", "pred_layer.proj.weight"],
    "Bark": ["fine_acoustics.input_embeds_layers.1.weight", "fine_acoustics.lm_heads.0.weight"],
    "a speech model": ["encoder.out.weight", "ctc_head.weight"],
}  # fmt: skip


def alike(names):
    return {name: Source(TensorSpec(DTYPES["float32"], (2,)), (Extent("x", 0, 8),)) for name in names}


@pytest.mark.parametrize("case", GROUPS)
def test_the_embedding_is_kept_and_not_the_head(case):
    kept, *others = GROUPS[case]
    for names in (sorted(GROUPS[case]), [kept, *others], [*others, kept]):
        assert find_ties(alike(names), "", lambda _: None) == dict.fromkeys((name for name in names if name != kept), kept)


def test_where_names_do_not_tell_the_class_may_and_then_the_order():
    names = ["layers.1.q.weight", "layers.0.q.weight"]
    assert find_ties(alike(names), "", lambda _: None) == {names[1]: names[0]}
    assert find_ties(alike(names), "", lambda given: given[1]) == {names[0]: names[1]}
    heads = ["model.decoder.bbox_embed.0.bias", "bbox_embed.0.bias"]
    assert find_ties(alike(heads), "DFineForObjectDetection", lambda _: None) == {heads[1]: heads[0]}
    assert find_ties(alike(heads), "GroundingDinoForObjectDetection", lambda _: None) == {heads[0]: heads[1]}
    flava = ["mlm_head.bias", "mlm_head.decoder.bias"]
    assert find_ties(alike(flava), "FlavaForPreTraining", lambda _: None) == {flava[0]: flava[1]}


def tied_model(folder, **config):
    folder.mkdir()
    shared = torch.arange(12.0).reshape(4, 3)
    tensors = {"lm_head.weight": shared, "model.embed_tokens.weight": shared, "model.norm.weight": torch.ones(3)}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def test_what_is_written_has_the_embedding_and_says_what_else_it_is(tmp_path, capsys):
    tensors = tied_model(tmp_path / "in", architectures=["LlamaForCausalLM"], model_type="llama")
    assert run("convert", tmp_path / "in", tmp_path / "out") == 0
    assert "lm_head.weight is model.embed_tokens.weight, stored once" in capsys.readouterr().out
    assert set(read(tmp_path / "out")) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert open_checkpoint(tmp_path / "out").ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert run("verify", tmp_path / "in", tmp_path / "out") == 0
    assert run("convert", tmp_path / "in", tmp_path / "both", "--set", "tied=copy", "--quiet") == 0
    assert set(read(tmp_path / "both")) == set(tensors)


@pytest.mark.parametrize("config", [{"architectures": 5}, {"architectures": []}, {}])
def test_a_config_that_names_no_class_is_no_hindrance(tmp_path, config):
    tied_model(tmp_path / "in", **config)
    assert run("convert", tmp_path / "in", tmp_path / "out", "--quiet") == 0
    assert set(read(tmp_path / "out")) == {"model.embed_tokens.weight", "model.norm.weight"}


def test_the_library_is_not_loaded_where_names_tell(tmp_path):
    tied_model(tmp_path / "in", architectures=["LlamaForCausalLM"], model_type="llama")
    code = "import sys; from streamconv.cli import main; main(sys.argv[1:]); sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, "convert", tmp_path / "in", tmp_path / "out"], check=True, timeout=600)


# Against the library ---------------------------------------------------------------------------------------------------

SOME = (
    "llama", "gpt2", "t5", "bart", "bert", "albert", "roberta", "whisper", "marian", "gemma3", "bloom", "t5gemma2", "udop", "prophetnet",
    "fsmt", "d_fine", "mm-grounding-dino", "blip", "sam", "openai-gpt", "luke", "blt", "led", "seamless_m4t", "kosmos-2", "xlm",
)  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("kind", SOME)
def test_save_pretrained_keeps_the_same(kind):
    transformers = pytest.importorskip("transformers", minversion="5")
    import tiny_models
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    from streamconv.library.model import choose_kept

    tested = 0
    for model in tiny_models.every_class(transformers, kind):
        tensors = model.state_dict()
        kept = remove_tied_weights_from_state_dict(dict(tensors), model)
        names = [name for name, tensor in tensors.items() if tensor.numel()]
        entries = {
            name: Source(TensorSpec(DTYPES["float32"], tuple(tensors[name].shape)), (Extent("x", tensors[name].data_ptr(), 4),))
            for name in names
        }
        architecture = type(model).__name__
        dropped = set(names) - set(kept)
        assert set(find_ties(entries, architecture, lambda _: None)) == dropped, architecture
        config = {**model.config.to_dict(), "architectures": [architecture]}
        ask = choose_kept(config)
        assert set(find_ties(entries, architecture, ask)) == dropped, architecture
        for name, first in find_ties(entries, architecture, lambda _: None).items():
            alike_names = [other for other in names if entries[other] == entries[first]]
            assert ask(alike_names) in (first, None), (architecture, name)
        tested += bool(dropped)
    assert tested
