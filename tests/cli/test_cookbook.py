"""Every command that README.md shows is run, and prints what is shown but for times, rates and memory.

Those with URLs are run with stand-ins of the Hub and of an object store. As a program, ``python tests/cli/test_cookbook.py DIR`` makes the
checkpoints of the cookbook; with ``--write`` it also writes what the commands print into README.md.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_files import numbered, write
from hub_server import hub
from servers import s3

from streamconv.cli import command as cli
from streamconv.cli.parser import build_parser
from tools.crash import read_tree

README = Path(__file__).parent.parent.parent / "README.md"
BLOCK = re.compile(r"^<!-- (run|run with servers) -->\n```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^<!-- ([\w-]+\.(?:slurm|sh|yaml)) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = {"|", ">", "for", "done"}
SBATCH = """#!/bin/bash
# What Slurm would do, at once: every task of an array, or a command once what it depends on has come to a good end.
set -eu
for argument; do case $argument in --dependency=afterok:*) [ "${argument#*:}" = 7 ] && [ -e complete ] ;; esac; done
if [ "$1" = --parsable ]; then
    range=$(sed -n 's/^#SBATCH --array=//p' "$2")
    for task in $(shuf -i "$range"); do
        echo "$task"
    done | xargs -P 4 -I @ env SLURM_ARRAY_TASK_ID=@ SLURM_ARRAY_TASK_COUNT=99 bash "$2" >&2
    touch complete
    echo "7;cluster"
else
    for last; do :; done
    bash -c "$last"
fi
"""
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "hidden_act": "silu", "max_position_embeddings": 2048,
}  # fmt: skip


def make_checkpoints(folder: Path) -> None:
    """What the cookbook works on: Llama in three shards, the same with a damaged one, and as pickles, and a toy of a family of its own."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, 64), "model.norm.weight": (64,), "lm_head.weight": (256, 64)}
    for i in range(4):
        stem = f"model.layers.{i}"
        shapes |= {f"{stem}.self_attn.{name}_proj.weight": (32 if name in "kv" else 64, 64) for name in "qkvo"}
        shapes |= {
            f"{stem}.mlp.gate_proj.weight": (96, 64),
            f"{stem}.mlp.up_proj.weight": (96, 64),
            f"{stem}.mlp.down_proj.weight": (64, 96),
        }
        shapes |= {f"{stem}.input_layernorm.weight": (64,), f"{stem}.post_attention_layernorm.weight": (64,)}
    llama = numbered(shapes, torch.bfloat16)
    for name in ("Llama", "broken"):
        write(folder / name, llama, shards=3, config=LLAMA)
        (folder / name / "tokenizer.json").write_text("{}")
    last = folder / "broken" / "model-00003-of-00003.safetensors"
    last.write_bytes(last.read_bytes()[:-1000])
    torch.save({**llama, "lm_head.weight": llama["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    (folder / "pickled").mkdir()
    torch.save(llama, folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "config.json").write_text(json.dumps(LLAMA))
    toy: dict[str, tuple[int, ...]] = {"embed.weight": (100, 16)}
    wanted: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (100, 16)}
    for i in range(2):
        toy |= {f"blocks.{i}.attn.{name}.weight": (16 if name == "q" else 8, 16) for name in "qkv"}
        toy |= {f"blocks.{i}.experts.{e}.up.weight": (24, 16) for e in range(4)}
        wanted |= {f"model.layers.{i}.self_attn.qkv_proj.weight": (32, 16), f"model.layers.{i}.mlp.experts.up_proj": (4, 16, 24)}
    write(folder / "toy", numbered(toy))
    (folder / "wanted.json").write_text(json.dumps(wanted))


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which ``hf://org/Llama``, ``hf://org/pickled`` and ``s3://bucket/Llama`` are checkpoints of ``folder``."""
    with hub({"org/Llama": folder / "Llama", "org/pickled": folder / "pickled"}) as library, s3() as store:
        store.put_folder(folder / "Llama", "Llama/")
        # huggingface_hub uploads in a way that its own HTTP library frowns upon.
        quiet = "error,ignore:Use 'content=:DeprecationWarning"
        yield {**library.env, **store.env, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONWARNINGS": quiet}


def execute(command: str, folder: Path, servers: dict[str, str] | None = None) -> str:
    """What a command prints in ``folder``, with paths as they are there, and the Hub's address as it is in the world."""
    program = f'streamconv() {{ "{sys.executable}" -m streamconv "$@"; }}\n{command}'
    quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "140", "PYTHONWARNINGS": "error", **(servers or {})}
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=folder,
        env=quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout.replace(f"{folder}/", "").replace(quiet.get("HF_ENDPOINT", "\0"), "https://huggingface.co").rstrip("\n")


def execute_here(command: str, folder: Path) -> str:
    """`execute`, in this process where that is the same: not in pipes, nor where memory is bound by less than this process has."""
    words = shlex.split(command)
    if words[:2] == ["streamconv", "demo"] or words[0] != "streamconv" or "--max-memory" in words or SHELL.intersection(words):
        return execute(command, folder)
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        cli.main(words[1:])
    return printed.getvalue().replace(f"{folder}/", "").rstrip("\n")


def commands(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what it is shown to print."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output.rstrip("\n")


def without_measures(output: str) -> str:
    """An output without what differs from run to run: times, rates, memory, room on the disk, commits, and where the package is."""
    output = re.sub(r"[\d.]+ (min|ms|s)\b", "# s", output)
    output = re.sub(r"\([\d.]+ [kMGT]?B/s\)", "(#/s)", output)
    output = re.sub(r"(peak memory|memory|takes|needs|up to|use --max-memory)(:?\s+)[\d.]+ ?[kMGT]?B", r"\1 #", output)
    output = re.sub(r"^(\s*(free|disk|memory|peak)\b.*?)[\d.]+ [kMGT]?B.*", r"\1#", output, flags=re.MULTILINE)
    return re.sub(r"schema=\S+", "schema=#", re.sub(r"@[0-9a-f]{40}\b", "@#", output))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("cookbook").resolve()
    make_checkpoints(place)
    return place


def check_blocks(kind: str, least: int, folder: Path, servers: dict[str, str] | None = None) -> None:
    blocks = [block for mark, block in BLOCK.findall(README.read_text()) if mark == kind]
    assert len(blocks) >= least
    call = functools.partial(execute, folder=folder, servers=servers) if servers else functools.partial(execute_here, folder=folder)
    for command, output in (pair for block in blocks for pair in commands(block)):
        assert without_measures(call(command)) == without_measures(output), (
            f"{command}; python tests/cli/test_cookbook.py --write DIR writes it anew"
        )


@pytest.mark.slow
def test_every_command_with_urls_prints_what_is_shown(folder):
    with serve(folder) as servers:
        check_blocks("run with servers", 3, folder, servers)


def test_every_command_prints_what_is_shown(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    check_blocks("run", 11, folder)
    code = re.search(r"^<!-- play.py -->\n```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert code
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr


def test_every_console_block_of_the_readme_is_run():
    shown = re.findall(r"^```console$", README.read_text(), re.MULTILINE)
    assert len(shown) == len(BLOCK.findall(README.read_text()))
    every = {name for _, block in BLOCK.findall(README.read_text()) for name in re.findall(r"streamconv (\w+)", block)}
    assert {"convert", "plan", "run", "inspect", "doctor", "verify", "recipes", "demo"} <= every


def test_names_in_the_readme_exist():
    """Options and recipes that the text names are there."""
    from streamconv.recipes import registry

    text = FILE.sub("", README.read_text())  # which call other programs, too
    parser = build_parser()
    choices = parser._subparsers._group_actions[0].choices.values()
    known = {option for command in (parser, *choices) for action in command._actions for option in action.option_strings}
    others = {"--write", "--reflink", "--check"}  # of this file, of cp and of sha256sum
    for option in set(re.findall(r"(?<=[` ])--[a-z][a-z-]+", text)) - others:
        assert option in known, option
    for name in re.findall(r"`([a-z0-9_-]+-[a-z]+2[a-z]+)`", text):
        assert name in registry(), name


def read_files() -> dict[str, str]:
    """The scripts and manifests of the cookbook, by name."""
    return dict(FILE.findall(README.read_text()))


def test_scripts_and_manifests_are_well_formed():
    files = read_files()
    assert {"ray.sh", "convert.slurm", "submit.sh", "kubernetes.sh", "convert.yaml", "finish.yaml"} <= files.keys()
    for name, text in files.items():
        if name.endswith(".yaml"):
            assert isinstance(yaml.safe_load(text), dict), name
        else:
            assert text.startswith("#!/bin/bash\n"), name
            assert subprocess.run(["bash", "-n", "-c", text], check=False, timeout=600).returncode == 0, name


def test_what_scripts_give_streamconv_parses():
    """That of scripts whose clusters have no stand-in here, too."""
    parser = build_parser()
    for name, text in read_files().items():
        if name.endswith((".sh", ".slurm")):
            lines = (shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines())
            given = [words[words.index("streamconv") + 1 :] for words in lines if "streamconv" in words]
            assert given or name == "kubernetes.sh", name
            for words in given:
                parser.parse_args([re.sub(r"^\$\w+/\$\w+$", "1/2", word) for word in words])


def test_the_slurm_script_makes_what_convert_makes(folder, tmp_path):
    """With stand-ins for sbatch and srun that do what Slurm would, and four tasks of the sixteen."""
    streamconv = f'#!/bin/bash\nexec "{sys.executable}" -m streamconv "$@"\n'
    scripts = read_files()
    for large, small in (("--array=0-15", "--array=0-3"), ("PARTS=16", "PARTS=4")):
        assert scripts["convert.slurm"].count(large) == 1
        scripts["convert.slurm"] = scripts["convert.slurm"].replace(large, small)
    for name, text in {"sbatch": SBATCH, "srun": '#!/bin/bash\nexec "$@"\n', "streamconv": streamconv, **scripts}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "Llama").symlink_to(folder / "Llama")
    found = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["./submit.sh"], cwd=tmp_path, env=found, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the output is complete" in done.stdout
    assert "convert" in execute(f"streamconv convert Llama '{tmp_path}/whole' --max-shard-size 50KB --quiet && echo convert", folder)
    assert read_tree(tmp_path / "from-slurm") == read_tree(tmp_path / "whole")


def test_the_kubernetes_manifests_make_what_convert_makes(folder, tmp_path):
    """Each container's command, as kubelet would run it, with the volume's folder in its place."""
    parts, end = (yaml.safe_load(read_files()[name]) for name in ("convert.yaml", "finish.yaml"))
    assert parts["spec"]["completionMode"] == "Indexed"
    assert f"job/{parts['metadata']['name']}\n" in read_files()["kubernetes.sh"]
    execute(f"streamconv plan Llama '{tmp_path}/dst' --max-shard-size 50KB --out '{tmp_path}/plan.json'", folder)
    for job, indexes in ((parts, range(parts["spec"]["completions"])), (end, range(1))):
        assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
        pod = job["spec"]["template"]["spec"]
        (container,), (volume,) = pod["containers"], pod["volumes"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] == volume["name"]
        for index in indexes:
            command = [
                word.replace(f"{mount['mountPath']}/", f"{tmp_path}/").replace("$(JOB_COMPLETION_INDEX)", str(index))
                for word in container["command"]
            ]
            assert cli.main(command[1:]) == 0
    execute(f"streamconv convert Llama '{tmp_path}/whole' --max-shard-size 50KB", folder)
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")


def write_outputs(folder: Path, servers: dict[str, str]) -> None:
    def fill(match: re.Match[str]) -> str:
        given = servers if match[1] == "run with servers" else None
        rows = [f"$ {command}\n{output}\n" if output else f"$ {command}\n" for command, output in
                ((command, execute(command, folder, given)) for command, _ in commands(match[2]))]  # fmt: skip
        text = re.sub(r"schema=\S+/streamconv/", "schema=.../streamconv/", "\n".join(rows).replace("\n\n\n", "\n\n"))
        return f"<!-- {match[1]} -->\n```console\n{text}```"

    README.write_text(BLOCK.sub(fill, README.read_text()))


if __name__ == "__main__":
    place = Path(sys.argv[-1]).resolve()
    make_checkpoints(place)
    if "--write" in sys.argv:
        with serve(place) as found:
            write_outputs(place, found)
