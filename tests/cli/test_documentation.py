"""Every command that the documentation shows is run, and prints what is shown but for times, rates and memory.

Those with URLs are run with stand-ins of the Hub and of an object store.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import documentation
import pytest
import yaml
from documentation import BLOCK, PAGES, README, commands, execute, execute_here, make_checkpoints, run_here, serve, without_measures

from streamconv.cli import command as cli
from streamconv.cli.parser import build_parser
from tools import make_recipe_page
from tools.crash import read_tree

FILE = re.compile(r"^<!-- ([\w-]+\.(?:slurm|sh|yaml)) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("documentation").resolve()
    make_checkpoints(place)
    return place


def check_blocks(page: Path, kind: str, folder: Path, servers: dict[str, str] | None = None) -> None:
    call = functools.partial(execute, folder=folder, servers=servers) if servers else functools.partial(execute_here, folder=folder)
    for mark, block in BLOCK.findall(page.read_text()):
        for command, output in commands(block) if mark == kind else ():
            assert without_measures(call(command)) == without_measures(output), (
                f"{page.name}: {command}; PYTHONPATH=tests/fixtures:. python tests/fixtures/documentation.py --write DIR writes it anew"
            )


def pages_with(kind: str) -> list[Path]:
    return [page for page in PAGES if any(mark == kind for mark, _ in BLOCK.findall(page.read_text()))]


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("run with servers"), ids=lambda page: page.name)
def test_commands_with_urls_print_what_is_shown(tmp_path, page):
    make_checkpoints(tmp_path)
    with serve(tmp_path) as servers:
        check_blocks(page, "run with servers", tmp_path, servers)


@pytest.mark.parametrize("page", pages_with("run"), ids=lambda page: page.name)
def test_commands_print_what_is_shown(tmp_path, monkeypatch, page):
    """Each page by itself, from the checkpoints that all begin with."""
    monkeypatch.setenv("COLUMNS", "140")
    make_checkpoints(tmp_path)
    check_blocks(page, "run", tmp_path)


def test_the_example_in_python(folder):
    done = subprocess.run(
        [sys.executable, "-c", documentation.listing("play.py")], cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_every_console_block_is_run():
    every = set()
    for page in PAGES:
        shown = re.findall(r"^```console$", page.read_text(), re.MULTILINE)
        assert len(shown) == len(BLOCK.findall(page.read_text())), page
        every |= {name for _, block in BLOCK.findall(page.read_text()) for name in re.findall(r"streamconv (\w+)", block)}
    assert {"convert", "plan", "run", "inspect", "doctor", "verify", "diff", "merge", "recipes", "demo"} <= every


def jobs() -> list[str]:
    """The commands of README.md's table of jobs."""
    table = re.search(r"<!-- jobs -->\n(.*?)\n<!-- end of jobs -->", README.read_text(), re.DOTALL)
    assert table
    commands = [re.fullmatch(r"\|.*\| `(streamconv .*)` \|", row) for row in table[1].splitlines()[2:]]
    assert all(commands), "each row ends in a command"
    return [command[1].replace("\\|", "|") for command in commands if command]


def asks_transformers(command: str) -> bool:
    return re.search(r"Llama-(tp|native)\b", command) is not None


@pytest.mark.oracle
def test_jobs_that_ask_transformers_work(folder):
    pytest.importorskip("transformers")
    asking = list(filter(asks_transformers, jobs()))
    assert len(asking) == 4
    for command in asking:
        code, printed = run_here(shlex.split(command)[1:], folder)
        assert code == 0, f"{command}\n{printed}"


def test_every_job_of_the_table_works(folder):
    local = [command for command in jobs() if "://" not in command and not asks_transformers(command)]
    assert len(local) >= 30
    for command in local:
        code, printed = run_here(shlex.split(command)[1:], folder)
        assert code == 0, f"{command}\n{printed}"


@pytest.mark.slow
def test_jobs_with_urls_work(tmp_path):
    make_checkpoints(tmp_path)
    with serve(tmp_path) as servers:
        for command in jobs():
            if "://" in command:
                assert execute(f"{command} --quiet && echo done", tmp_path, servers) == "done"


def test_the_readme_is_read_in_five_minutes():
    assert len(README.read_text().splitlines()) <= 200


def test_names_in_the_documentation_exist():
    """Options and recipes that the text names are there."""
    from streamconv.recipes import registry

    parser = build_parser()
    choices = parser._subparsers._group_actions[0].choices.values()
    known = {option for command in (parser, *choices) for action in command._actions for option in action.option_strings}
    others = {"--write", "--reflink", "--check"}  # of a test, of cp and of sha256sum
    for page in (page for page in PAGES if page != make_recipe_page.PAGE):  # whose references name other programs' options
        text = FILE.sub("", page.read_text())  # which call other programs, too
        for option in set(re.findall(r"(?<=[` ])--[a-z][a-z-]+", text)) - others:
            assert option in known, (page.name, option)
        for name in re.findall(r"`([a-z0-9_-]+-[a-z]+2[a-z]+)`", text):
            assert name in registry(), (page.name, name)


def test_the_page_of_recipes_is_made_of_them():
    assert make_recipe_page.PAGE.read_text() == make_recipe_page.page(), "python -m tools.make_recipe_page"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join([str(documentation.ROOT), *sys.path])}
    done = subprocess.run(command, cwd=documentation.ROOT, env=quiet, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    pages = {page.with_suffix(".html").name for page in PAGES if page != README}
    assert pages <= {page.name for page in (tmp_path / "site").iterdir()}
    front = (tmp_path / "site" / "index.html").read_text()
    elsewhere = re.findall(r'src="(https?:[^"]*)"|<link rel="stylesheet" href="(https?:[^"]*)"', front)
    assert not elsewhere, "the site works offline"


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            target, _, anchor = link.partition("#")
            if "://" in target:
                continue
            path = page.parent / target if target else page
            assert path.exists(), (page.name, link)
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if path.suffix == ".md" else []
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, (page.name, link)


def read_files() -> dict[str, str]:
    """The scripts and manifests of the documentation, by name."""
    return {name: text for page in PAGES for name, text in FILE.findall(page.read_text())}


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
