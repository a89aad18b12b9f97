"""sentence-transformers, diffusers, PEFT and transformers load what is made of their folders, with the values that were there."""

import json

import pytest
import torch
from checkpoint_files import run

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", minversion="5")


@pytest.fixture
def tokenizer(transformers, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))


def same(mine, theirs, change=lambda tensor: tensor):
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], change(tensor)), name


@pytest.fixture
def bert(transformers, tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=31, max_position_embeddings=64, **sizes))
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("container", ["safetensors", "torch"])
@pytest.mark.parametrize("safe", [True, False])
def test_sentence_transformers(bert, tmp_path, safe, container):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    parts = [modules.Transformer(str(bert)), modules.Pooling(32, "mean"), modules.Dense(32, 16), modules.LayerNorm(16)]
    model = library.SentenceTransformer(modules=parts, device="cpu")
    model.save(str(tmp_path / "in"), safe_serialization=safe)
    assert run("convert", tmp_path / "in", tmp_path / "out", "--format", container, "--verify", "--quiet") == 0
    made = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    same(made.state_dict(), model.state_dict())
    assert (made.encode(["ab c"]) == model.encode(["ab c"])).all()


def test_a_router_of_sentence_transformers(bert, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    ways = [[modules.Transformer(str(bert)), modules.Pooling(32)] for _ in range(2)]
    router = modules.Router.for_query_document(query_modules=ways[0], document_modules=ways[1])
    model = library.SentenceTransformer(modules=[router], device="cpu")
    model.save(str(tmp_path / "in"))
    assert run("convert", tmp_path / "in", tmp_path / "out", "--max-shard-size", "20kB", "--quiet") == 0
    same(library.SentenceTransformer(str(tmp_path / "out"), device="cpu").state_dict(), model.state_dict())


@pytest.fixture
def pipeline(transformers, tokenizer):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
    )  # fmt: skip
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=(32, 64), norm_num_groups=8, **blocks)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=31, bos_token_id=0, eos_token_id=2, **sizes))
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=diffusers.DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def load(folder, **settings):
    import diffusers

    found = diffusers.StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None, requires_safety_checker=False, **settings)
    return {name: getattr(found, name).state_dict() for name in ("unet", "vae", "text_encoder")}


@pytest.mark.parametrize("options", [[], ["--max-shard-size", "300kB"], ["--format", "torch"], ["--dtype", "bf16"]])
@pytest.mark.parametrize("safe", [True, False])
def test_pipelines_of_diffusers(pipeline, tmp_path, safe, options):
    pipeline.save_pretrained(tmp_path / "in", safe_serialization=safe, max_shard_size="10GB" if safe else "500kB")
    assert run("convert", tmp_path / "in", tmp_path / "out", *options, "--quiet") == 0
    half = "--dtype" in options
    made = load(tmp_path / "out", use_safetensors="torch" not in options, **({"torch_dtype": torch.bfloat16} if half else {}))
    for name, found in made.items():
        theirs = getattr(pipeline, name).state_dict()
        same(found, theirs, (lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor) if half else lambda t: t)


def test_one_component_of_diffusers(pipeline, tmp_path):
    import diffusers

    pipeline.unet.save_pretrained(tmp_path / "in", max_shard_size="300kB")
    assert run("convert", tmp_path / "in", tmp_path / "out", "--format", "torch", "--quiet") == 0
    made = diffusers.UNet2DConditionModel.from_pretrained(str(tmp_path / "out"), use_safetensors=False)
    same(made.state_dict(), pipeline.unet.state_dict())


@pytest.mark.parametrize("container", ["safetensors", "torch"])
@pytest.mark.parametrize("safe", [True, False])
def test_adapters_of_peft(transformers, tmp_path, safe, container):
    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}

    def base():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **sizes))

    model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "in"), safe_serialization=safe)
    (tmp_path / "in" / "checkpoint-5").mkdir()
    model.save_pretrained(str(tmp_path / "in" / "checkpoint-5"))
    assert run("convert", tmp_path / "in", tmp_path / "out", "--format", container, "--quiet") == 0
    assert not (tmp_path / "out" / "checkpoint-5").exists()
    same(peft.PeftModel.from_pretrained(base(), str(tmp_path / "out")).state_dict(), model.state_dict())


def test_a_trainers_folder_gives_its_model(transformers, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **sizes))
    for folder in ("in", "in/checkpoint-5"):
        model.save_pretrained(tmp_path / folder, max_shard_size="20kB")
        torch.save({}, tmp_path / folder / "optimizer.pt")
        torch.save({}, tmp_path / folder / "training_args.bin")
    assert run("convert", tmp_path / "in", tmp_path / "out", "--dtype", "fp16", "--quiet") == 0
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    found = transformers.LlamaForCausalLM.from_pretrained(str(tmp_path / "out"))
    same(found.state_dict(), model.state_dict(), lambda tensor: tensor.half())


@pytest.mark.parametrize("options", [[], ["--max-shard-size", "300kB"]])
def test_variants_of_diffusers(pipeline, tmp_path, options):
    pipeline.save_pretrained(tmp_path / "in")
    pipeline.to(torch.float16).save_pretrained(tmp_path / "in", variant="fp16", max_shard_size="500kB")
    for variant in ("fp16", None):
        asked = ["--variant", variant] if variant else []
        assert run("convert", tmp_path / "in", tmp_path / f"out{variant}", *asked, *options, "--quiet") == 0
        made = load(tmp_path / f"out{variant}", variant=variant, torch_dtype=torch.float16)
        for name, tensors in made.items():
            same(tensors, getattr(pipeline, name).state_dict())


@pytest.mark.parametrize("size", ["20kB", "5GB"])
def test_variants_of_transformers(transformers, bert, tmp_path, size):
    model = transformers.BertModel.from_pretrained(str(bert), dtype=torch.float16)
    model.save_pretrained(bert, variant="half", max_shard_size="30kB")
    assert run("convert", bert, tmp_path / "out", "--variant", "half", "--max-shard-size", size, "--quiet") == 0
    same(transformers.BertModel.from_pretrained(str(tmp_path / "out"), variant="half").state_dict(), model.state_dict())
