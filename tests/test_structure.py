"""The shape of the package: which module may import which, and what every module owes its readers."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamconv

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "streamconv"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# From the ground up, with the most statements that each may have (docstrings and imports not counted, so that neither how a line is
# broken nor dividing a module makes a difference). A package imports from itself and from those above its line; one that outgrows its
# number holds a second idea, which wants a package of its own.
PACKAGES = {
    "": 640,  # modules of the package itself below all others: errors, dtypes, units, memory, text ...
    "notation": 960,  # strings and integers
    "storage": 1_690,  # where files are; most of it is what servers need, parts of one file on their way at a time, and what is held
    "graph": 3_160,  # nodes, ops (630 statements of adapters, merges and functions), how regions are made, numbers, codes, what is lost
    "formats": 2_390,  # containers and all that is known of their names, the machine for pickles and its records, what files of others are
    "trainers": 1_400,  # checkpoints of trainers, a module for each kind, tables of very many boxes, and tensors that lie cut into them
    "checkpoint": 620,  # finding out what a path holds
    "schemes": 1_075,  # quantizations, what they say of single modules, the list that others add to, names, experts in stacks, layers alike
    "recipe": 1_520,  # the mechanism of recipes, with functions as steps, what config.json says afterwards with it
    "library": 1_130,  # what other libraries know, the op that runs their code, and the process in which four of them open checkpoints
    "adapters": 580,  # what PEFT trains beside a model, a module for each kind (12 statements: kernels of convolutions as cores)
    "recipes": None,  # declarations: as many as there are families
    "planning": 1_110,  # nodes to plans
    "engine": 965,  # bytes of one machine, blocks that neighbours share, tensors read side by side, what threads spend their time with
    "running": 2_480,  # runs of a plan, what shows while one is planned, the state of an output, executors, --check-load
    "merging": 785,  # what a file of mergekit says, by its lines; of tensors' names, layers, their kinds and tokens, and of arithmetic
    "conversion": 1_565,  # options, calls; tensors in Python; plans, streams; codes, as a whole, and numbers, who reads them; configs
    "changes": 380,  # what became of tensors from one checkpoint to another, how far they are from what they were, in words
    "advice": 500,  # what a checkpoint is, what people want, which options follow (or which config is missing), which recipes fit
    "diagnose": 1_370,  # what is said of checkpoints (ranks and Megatron's, too), and of adapters, by libraries that open them too
    "front": 665,  # what people meet: the command, from what they want to options, what shells complete, the demo
}
FRONT = {"demo", "__main__", ""}


def package_of(module: str) -> str:
    """The package whose rules a module keeps: ``front`` is what stands above all others."""
    first = module.split(".", maxsplit=1)[0]
    if module in FRONT or first == "cli":
        return "front"
    return first if first in PACKAGES else ""


def modules() -> dict[str, Path]:
    """Every module by its name within the package; the package itself is ``""``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Modules of this package that a module imports, in functions too, and the line of each."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{absolute(module, node)}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "streamconv":
                yield nearest_module(name), node.lineno


def absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that ``from ... import`` names."""
    if not node.level:
        return node.module or ""
    parts = ["streamconv", *module.split(".")] if module else ["streamconv"]
    package = parts if MODULES[module].stem == "__init__" else parts[:-1]
    return ".".join(filter(None, [*package[: len(package) - node.level + 1], node.module]))


def nearest_module(name: str) -> str:
    """The module that ``streamconv.a.b.Thing`` is in."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def test_there_are_modules():
    assert {"", "cli.command", "engine.io", "formats.safetensors", "recipes.originals.internvl"} <= MODULES.keys()
    assert ("checkpoint.opening", 17) not in imports("errors")
    assert "engine.io" in {name for name, _ in imports("running.filling")}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    for other, line in imports(module):
        order = list(PACKAGES)
        above = order.index(package_of(other)) <= order.index(package_of(module))
        assert above, f"{MODULES[module]}:{line}: {module} must not import {other}"


def test_modules_do_not_import_each_other_in_circles():
    above = {module: {other for other, _ in imports(module)} - {module} for module in MODULES}
    while above:
        free = {module for module, others in above.items() if not others & above.keys()}
        assert free, f"a circle among {sorted(above)}"
        above = {module: others for module, others in above.items() if module not in free}


def test_a_worker_loads_no_recipe_and_no_container():
    """What a remote worker runs: a plan from JSON, by the engine."""
    code = (
        "import sys; from streamconv.planning.plan import Plan; from streamconv.running import filling, lock\n"
        "own = {name for name in sys.modules if name.startswith('streamconv.')}\n"
        "print(sorted(own))"
    )
    # The package's own __init__ loads everything; a worker may do without it.
    stub = (
        f"import sys, types\nsys.modules['streamconv'] = package = types.ModuleType('streamconv')\npackage.__path__ = [{str(PACKAGE)!r}]\n"
    )
    done = subprocess.run([sys.executable, "-c", stub + code], capture_output=True, text=True, check=True, timeout=600)
    loaded = set(ast.literal_eval(done.stdout))
    assert "streamconv.running.filling" in loaded
    assert not {name for name in loaded if re.match(r"streamconv\.(recipe|recipes|checkpoint|formats\.)", name)}


def test_recipes_are_declarations():
    """They know what a recipe is and nothing else of the package, and no library."""
    for module, path in MODULES.items():
        if not module.startswith("recipes."):
            continue
        allowed = {"library.bridge", "library.parallel", "recipe"} | {other for other in MODULES if other.startswith("recipes.")}
        assert {other for other, _ in imports(module)} <= allowed, module
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [absolute(module, node)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                first = name.split(".")[0]
                assert first in sys.stdlib_module_names | {"streamconv"}, f"{path}:{node.lineno}: imports {name}"
                assert first not in {"os", "pathlib", "subprocess", "shutil", "io"}, f"{path}:{node.lineno}: imports {name}"


def test_the_notation_knows_no_files_and_no_tensors():
    for module in MODULES:
        if module.split(".")[0] != "notation" and module not in {"errors", "dtypes", "units", "digests"}:
            continue
        for node in ast.walk(ast.parse(MODULES[module].read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [absolute(module, node)] if isinstance(node, ast.ImportFrom) else []
            assert not {"os", "pathlib", "numpy", "torch", "mmap", "io"} & {name.split(".")[0] for name in names}, f"{module}:{node.lineno}"


# Every module ------------------------------------------------------------------------------------------------------


def public(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and the methods whose names say that they take arguments of users."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("module", MODULES)
def test_public_things_have_docstrings(module):
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree), f"{module} has no docstring"
    for node in public(tree):
        assert ast.get_docstring(node), f"{MODULES[module]}:{node.lineno}: {node.name} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_left_to_do(module):
    text = MODULES[module].read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert not re.search(r"^\s*except\s*:", text, re.MULTILINE)
    assert "raise NotImplemented" not in text


def test_names_say_what_is_inside():
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "base", "core", "manager", "managers", "shared"}
    for path in (*PACKAGE.rglob("*"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").rglob("*.py")):
        assert path.stem.lower() not in vague, path
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not re.search(r"Manager|Helper|Util", node.name), f"{path}:{node.lineno}"


def statements(text: str) -> int:
    """Statements of a module, without docstrings and imports: neither how a line is broken nor dividing a module makes a difference."""
    tree = ast.parse(text)
    count = sum(isinstance(node, ast.stmt) and not isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return count - sum(isinstance(node, documented) and ast.get_docstring(node) is not None for node in ast.walk(tree))


@pytest.mark.parametrize("package", [package for package, bound in PACKAGES.items() if bound])
def test_packages_stay_small(package):
    sizes = {module: statements(path.read_text()) for module, path in MODULES.items() if package_of(module) == package}
    assert sum(sizes.values()) < PACKAGES[package], f"{sum(sizes.values())}: {sorted(sizes.items(), key=lambda item: -item[1])[:8]}"


# What is written of them, and their tests --------------------------------------------------------------------------


def modules_of(package: str) -> set[str]:
    """The modules of a package, and its folders as ``NAME/``, as the table of CONTRIBUTING.md has them."""
    entries = set()
    for module, path in MODULES.items():
        within = module if package in {"", "front"} else module.partition(".")[2]
        first, dot, _ = within.partition(".")
        if package_of(module) == package and first and not first.startswith("_"):
            entries.add(f"{first}/" if dot or path.stem == "__init__" else first)
    return entries


@pytest.mark.parametrize("package", PACKAGES)
def test_the_table_of_packages_names_each_module_once(package):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    label = {"": "`streamconv/`", "front": "front"}.get(package, f"`{package}/`")
    rows = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    assert len(rows) == 1, f"CONTRIBUTING.md, table of packages: one row for {label}"
    named = re.findall(r"`(\w+/?)`", rows[0].removeprefix(f"| {label} |"))
    for module in sorted(modules_of(package) ^ set(named)):
        edit = "name it, and say what it is in few words" if module not in named else "there is no such module: leave it out"
        pytest.fail(f"CONTRIBUTING.md, table of packages, row {label}: `{module}`: {edit}", pytrace=False)
    assert len(named) == len(set(named)), f"CONTRIBUTING.md, table of packages, row {label}: each module once, found {sorted(named)}"


TESTS = ROOT / "tests"
TEST_MODULES = sorted(path for path in TESTS.rglob("*.py") if "fixtures" not in path.parts)


def test_tests_lie_in_folders_that_mirror_the_packages():
    expected = {package for package in PACKAGES if package not in {"", "front"}} | {"cli"}
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == expected | {"fixtures"}, "a folder tests/PACKAGE for each package, and tests/fixtures"
    for path in TEST_MODULES:
        assert path.name == "conftest.py" or path.name.startswith("test_"), f"{path}: what tests share lies in tests/fixtures"
        assert len(path.relative_to(TESTS).parts) <= 2, f"{path}: tests lie in tests/PACKAGE"
    for path in (TESTS / "fixtures").rglob("*.py"):
        assert not path.name.startswith("test_"), f"{path}: tests lie in tests/PACKAGE"


def test_no_test_module_imports_from_another():
    """What two of them need is a fixture, in a module of tests/fixtures that is named for what it makes."""
    names = {path.stem for path in TEST_MODULES}
    for path in (*TEST_MODULES, *(TESTS / "fixtures").rglob("*.py"), *(ROOT / "tools").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not names & {module.rpartition(".")[2] for module in modules}, (
                f"{path}:{node.lineno}: move what it takes to tests/fixtures"
            )
    assert PROJECT["tool"]["pytest"]["ini_options"]["pythonpath"] == ["tests/fixtures"]


# The project -------------------------------------------------------------------------------------------------------


def readme_command(mark: str) -> str:
    """The lines of the first code block after a mark in README.md."""
    found = re.search(rf"^<!-- {mark} -->\n```\w*\n(.*?)\n```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no command marked {mark}"
    return found[1]


@pytest.mark.parametrize("mark", ["demo", "test"])
def test_continuous_integration_runs_what_the_readme_says(mark):
    command = readme_command(mark)
    assert ("streamconv demo" if mark == "demo" else "pytest") in command
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    (function,) = [line for line in script.read_text().splitlines() if line.startswith("command_after()")]
    extracted = subprocess.run(
        ["bash", "-c", f"{function}\ncommand_after {mark}"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    assert extracted.stdout.rstrip("\n") == command
    assert re.search(rf"^for step in .*\b{mark}\b.*; do$", script.read_text(), re.MULTILINE)
    assert subprocess.run(["bash", "-n", "-c", command], check=False, timeout=600).returncode == 0


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["project"]["dynamic"]
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "streamconv/_version.py"
    stated = [path for path in MODULES.values() if re.search(r"^__version__ = ", path.read_text(), re.MULTILINE)]
    assert stated == [PACKAGE / "_version.py"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", streamconv.__version__)


def test_what_is_exported_exists():
    assert sorted(streamconv.__all__) == streamconv.__all__
    for name in streamconv.__all__:
        assert getattr(streamconv, name).__doc__, name


def test_the_package_does_without_what_only_tests_need():
    """Every module loads where none of the packages of the extras is there, but the one whose class is a tensor of torch."""
    extras = {name for group in PROJECT["project"]["optional-dependencies"].values() for name in group}
    needed = {re.split(r"[<>=!~\[ ]", name)[0].lower() for name in PROJECT["project"]["dependencies"]}
    own = {re.split(r"[<>=!~\[ ]", name)[0].lower().replace("-", "_") for name in extras} - needed - {"streamconv"}
    assert {"safetensors", "huggingface_hub", "hypothesis", "einops", "pytest", "transformers"} <= own
    names = [".".join(filter(None, ["streamconv", module])) for module in MODULES if module != "library.lazy"]
    code = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(own)!r}:
            raise ImportError(f"{{name}} is for tests")
sys.meta_path.insert(0, Refuse())
for name in {names!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_third_party_imports_are_declared():
    allowed = {re.split(r"[<>=!~\[ ]", name)[0].lower() for name in PROJECT["project"]["dependencies"]}
    allowed = {{"pyyaml": "yaml"}.get(name, name) for name in allowed} | {"streamconv"} | sys.stdlib_module_names
    # By its user\'s own choice, with a message where it is missing.
    optional = {"fsspec", "huggingface_hub", "ml_dtypes", "ray", "requests", "safetensors", "shtab", "torch", "transformers", "urllib3"}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [absolute(module, node)] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed | optional, f"{module}:{node.lineno}: {names}"


@pytest.mark.slow
def test_what_a_package_index_would_show(tmp_path):
    """The wheel and the sdist pass ``twine check``, the page's links lead into the repository, and the sdist has what it names."""
    pytest.importorskip("build")
    pytest.importorskip("twine")

    def call(*command: str) -> None:
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr

    call("build", "--outdir", str(tmp_path), str(ROOT))
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    call("twine", "check", "--strict", str(wheel), str(sdist))
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        text = archive.read(name).decode()
    assert not re.findall(r"\]\((?!https://)[^)]*\)", text)
    with tarfile.open(sdist) as archive:
        names = {member.partition("/")[2] for member in archive.getnames()}
    assert {"README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "mkdocs.yml", "docs/index.md"} <= names


def test_type_checkers_see_every_public_name():
    tree = ast.parse(Path(streamconv.__file__).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname or alias.name for node in imports for alias in node.names} >= streamconv._HOMES.keys()
