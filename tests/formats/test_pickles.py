"""What lies beside weights in torch's files, and where the weights are: torch itself says which they are."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import enum
import functools
import json
import os
import pathlib
import pickle
import re
import shlex
import subprocess
import sys
import tempfile
import tracemalloc
import types
import warnings
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from checkpoint_files import assert_same, read, refusal, run, stored

from streamconv.checkpoint.opening import open_checkpoint, ties
from streamconv.errors import FormatError, UsageError
from streamconv.formats import torch as fmt
from streamconv.formats import unpickling
from streamconv.storage.locations import locate

LEGACY = {"_use_new_zipfile_serialization": False}
PROTOCOLS = [{"pickle_protocol": number} | kind for number, kind in ((1, LEGACY), (2, {}), (3, {}), (4, LEGACY), (5, {}))]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def bytes_of(tensor):
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_holds(contents, tensors):
    assert sorted(contents.entries) == sorted(tensors)
    for name, tensor in tensors.items():
        source = contents.entries[name]
        assert (source.spec.dtype.name, source.spec.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)), name
        assert stored(source) == bytes_of(tensor), name


def saved(path, tree, **options):
    torch.save(tree, path, **options)
    return path


def weights(**more):
    made = {"conv.weight": torch.randn(3, 2), "conv.bias": torch.randn(3).half(), **more}
    return collections.OrderedDict(made)


# Classes that a reader of the file does not have -------------------------------------------------------------------------


class Attributes(dict):
    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Ordered(collections.OrderedDict):
    pass


class Easy(dict):
    """A dict whose items are attributes too."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__.update(items)


class Config:
    def __init__(self):
        self._content = {"lr": 0.1}


class Slotted:
    __slots__ = ("a",)

    def __init__(self):
        self.a = 1


class Color(enum.Enum):
    RED = 1


class Flag(enum.IntFlag):
    A = 1
    B = 2


@dataclass
class Settings:
    lr: float = 0.1


Point = collections.namedtuple("Point", "x y")


class Keyed:
    """Made by __new__ with keywords."""

    def __new__(cls, *, a):  # noqa: ARG004 - what pickles give it
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"a": 1}


class Callback:
    pass


def rule(step):
    return step


def optimizer():
    made = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    made.param_groups[0]["params"][0].grad = torch.ones(2)
    made.step()
    return made


OBJECTS = {
    "namespace": lambda: argparse.Namespace(lr=0.1, more=argparse.Namespace(x=[1, 2])),
    "simple namespace": lambda: types.SimpleNamespace(a=1),
    "attributes": lambda: Attributes(lr=0.1, nested=Attributes(x=1)),
    "config": Config,
    "slots": Slotted,
    "keywords": lambda: Keyed(a=1),
    "numpy scalar": lambda: np.float64(0.9),
    "numpy array": lambda: np.arange(50_000.0),
    "numpy texts": lambda: np.array(["a", "b"], dtype=object),
    "numpy random": lambda: np.random.default_rng(0),
    "numpy random state": lambda: np.random.RandomState(0).get_state(),
    "path": lambda: pathlib.PosixPath("/x"),
    "pure path": lambda: pathlib.PureWindowsPath("C:/x"),
    "time": lambda: dt.datetime(2024, 1, 2, tzinfo=dt.UTC),
    "delta": lambda: dt.timedelta(seconds=3),
    "default": lambda: collections.defaultdict(list, a=[1]),
    "deque": lambda: collections.deque([1.0, 2.0], maxlen=3),
    "sets": lambda: [{1, 2}, frozenset("ab"), {"x": {3}}],
    "counter": lambda: collections.Counter("aab"),
    "range": lambda: [range(3), slice(1, 2), complex(1, 2), bytearray(b"x"), b"y" * 5000, "z" * 100_000],
    "a class as key": lambda: {Callback: {"best": 1.0}},
    "an object as key": lambda: {Callback(): 1, (1, ("a", None)): 2, 1.5: 3, None: 4, True: 5},
    "enum": lambda: [Color.RED, Flag.A | Flag.B],
    "function": lambda: [rule, len, torch.nn.functional.relu],
    "partial": lambda: functools.partial(rule, step=3),
    "method": lambda: "abc".upper,
    "dataclass": Settings,
    "namedtuple": lambda: Point(1, 2),
    "optimizer": optimizer,
    "scheduler": lambda: torch.optim.lr_scheduler.StepLR(optimizer(), 3),
    "torch version": lambda: torch.__version__,
    "torch generator": lambda: torch.Generator().get_state(),
    "big numbers": lambda: [2**100, -(2**70), 1e300, float("nan")],
    "exception": lambda: ValueError("x"),
    "distribution": lambda: torch.distributions.Normal(0.0, 1.0),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_beside_weights_are_left_out(tmp_path, kind):
    for number, options in enumerate(PROTOCOLS):
        if kind == "slots" and options["pickle_protocol"] < 2:
            continue
        tree = {"state_dict": weights(), "epoch": 3, "beside": OBJECTS[kind]()}
        path = saved(tmp_path / f"{number}.ckpt", tree, **options)
        contents = fmt.read(locate(path))
        assert_holds(contents, torch.load(path, weights_only=False)["state_dict"])
        assert (contents.root, contents.left_out) == ("state_dict", ["epoch", "beside"])
        (note,) = [note for note in contents.notes if "left out" in note]
        assert "'beside'" in note
        assert "\n" not in note
    assert kind not in ("namespace", "path", "time") or type(tree["beside"]).__name__ in note


@pytest.mark.parametrize("kind", [Attributes, Ordered, Easy, collections.defaultdict], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", PROTOCOLS[1:], ids=str)
def test_mappings_of_other_classes_hold_tensors_as_dicts_do(tmp_path, kind, options):
    made = kind(torch.zeros) if kind is collections.defaultdict else kind()
    made.update(weights())
    assert_holds(fmt.read(locate(saved(tmp_path / "x.pt", made, **options))), made)
    assert_holds(fmt.read(locate(saved(tmp_path / "y.pt", {"model": made, "epoch": 1}, **options))), made)


class Marked(torch.Tensor):
    pass


def test_tensors_of_other_classes_are_their_data(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).as_subclass(Marked)
    tensor.note = Config()
    tree = {"a": tensor, "b": torch.nn.Parameter(torch.ones(2)), "c": torch.nn.Buffer(torch.zeros(1)), "d": tensor[:, 1:]}
    contents = fmt.read(locate(saved(tmp_path / "x.pt", tree)))
    assert_holds(contents, {name: tensor.as_subclass(torch.Tensor) for name, tensor in tree.items()})


def test_what_stands_for_a_tensor_and_is_none_is_refused_by_its_class(tmp_path):
    class Wrapper:
        def __init__(self, data):
            self.data = data

        def __reduce__(self):
            return Settings, (self.data,)

    path = saved(tmp_path / "x.pt", {"w": torch.ones(1), "v": Wrapper(torch.ones(2))})
    with pytest.raises(FormatError, match=r"tensor 'v': made by test_pickles\.Settings, not plain data"):
        fmt.read(locate(path))


def test_keys_that_are_no_texts(tmp_path):
    tree = {0: torch.ones(1), 1.5: torch.zeros(1), None: torch.ones(2), (1, "a"): torch.ones(3), b"w": torch.ones(4)}
    contents = fmt.read(locate(saved(tmp_path / "x.pt", tree)))
    assert_holds(contents, {str(key): tensor for key, tensor in tree.items()})
    with pytest.raises(FormatError, match="two keys that read '1'"):
        fmt.read(locate(saved(tmp_path / "y.pt", {1: torch.ones(1), "1": torch.ones(2)})))


# Modules ---------------------------------------------------------------------------------------------------------------


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.register_buffer("none", None)
        self.register_parameter("nothing", None)
        self.plain = torch.ones(7)
        self.scales = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(1)) for _ in range(2)])
        self.by_name = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.randn(2))})


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.layers = torch.nn.ModuleList([Inner(), Inner()])
        self.shared = self.layers[0]
        self.act = torch.nn.ReLU()
        self.missing = None
        self.deep = torch.nn.Sequential(torch.nn.Sequential(torch.nn.MultiheadAttention(4, 2)))
        self.config = Config()


WRAPPED = {
    "alone": (lambda model: model, ""),
    "model": (lambda model: {"model": model, "epoch": 3, "ema": None, "optimizer": None, "train_args": {"lr": 1}}, "model"),
    "parallel": (torch.nn.DataParallel, ""),
    "parallel in a dict": (lambda model: {"net": torch.nn.DataParallel(model)}, "net"),
    "deep": (lambda model: {"checkpoint": {"state": [3, {"ema_model": model}]}}, "checkpoint.state.1.ema_model"),
    "in an object": (lambda model: argparse.Namespace(trainer=argparse.Namespace(model=model)), "trainer.model"),
    "averaged": (torch.optim.swa_utils.AveragedModel, ""),
}


def module_in(tree):
    """The one module in a tree."""
    if isinstance(tree, torch.nn.Module):
        return tree
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else vars(tree).values()
    return next(
        found for found in map(module_in, (one for one in inner if hasattr(one, "__dict__") or isinstance(one, dict | list))) if found
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, LEGACY], ids=["zip", "zip4", "legacy"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_modules_give_their_state_dict(tmp_path, kind, options):
    wrap, root = WRAPPED[kind]
    path = saved(tmp_path / "x.pt", wrap(Model()), **options)
    contents = fmt.read(locate(path))
    expected = module_in(torch.load(path, weights_only=False)).state_dict()
    assert contents.root == root
    assert_holds(contents, expected)
    tied = {name.rsplit(".", 2)[-2] for pair in ties(contents).items() for name in pair}
    assert {"embed", "head"} <= tied


def test_traced_modules_give_their_state_dict(tmp_path):
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)))
    assert_holds(fmt.read(locate(saved(tmp_path / "x.pt", traced))), traced.state_dict())


class Scripted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(2, 2)
        self.plain = torch.ones(3)
        self.register_buffer("buf", torch.zeros(2))
        self.register_buffer("passing", torch.zeros(4), persistent=False)
        self.norm = torch.nn.BatchNorm1d(2)
        self.ps = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1))])
        self.by_key = torch.nn.ModuleDict({"key": torch.nn.Linear(2, 2), "same": self.lin})

    def forward(self, x):
        y = self.lin(x) + self.buf + self.passing.sum() + self.plain.sum() + self.by_key["key"](x) + self.by_key["same"](x)
        for p in self.ps:
            y = y + p
        return self.norm(y)


class Program(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Scripted()
        self.b = Scripted()
        self.b.lin = self.a.lin
        self.blocks = torch.nn.Sequential(Scripted(), torch.nn.ReLU())

    def forward(self, x):
        return self.blocks(self.a(x) + self.b(x))


@pytest.mark.parametrize("how", ["script", "trace"])
def test_programs_give_their_state_dict(tmp_path, how):
    program = torch.jit.script(Program()) if how == "script" else torch.jit.trace(Program(), torch.ones(4, 2))
    program.save(tmp_path / "x.pt")
    loaded = torch.jit.load(tmp_path / "x.pt").state_dict()
    contents = fmt.read(locate(tmp_path / "x.pt"))
    assert_holds(contents, loaded)
    assert contents.root == ""
    kept = ties(contents)
    assert {kept.get(name, name) for name in ("a.lin.weight", "b.lin.weight", "a.by_key.same.weight")} & kept.keys() == set()
    assert len({"a.lin.weight", "b.lin.weight", "a.by_key.same.weight"} - kept.keys()) == 1


def test_frozen_programs_hold_no_parameters(tmp_path):
    torch.jit.freeze(torch.jit.script(Program()).eval()).save(tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"TorchScript program without parameters or buffers.*: give the file that it was frozen from"):
        fmt.read(locate(tmp_path / "x.pt"))


# Roots -----------------------------------------------------------------------------------------------------------------


def adam():
    return {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


ONE = torch.ones(1)
FOUND = {
    "lightning": (
        {
            "epoch": 3,
            "state_dict": weights(),
            "optimizer_states": [adam()],
            "lr_schedulers": [{"base_lrs": [0.1]}],
            "callbacks": {Callback: {"best": ONE, "ema.weights": ONE}},
            "hyper_parameters": Attributes(lr=0.1, backbone=torch.nn.Linear(1, 1)),
            "loops": {"fit": {"state_dict": {"x": ONE}}},
        },
        "state_dict",
    ),
    "ultralytics": ({"model": torch.nn.Linear(2, 2), "ema": None, "train_args": {"a": 1}, "train_metrics": {"m": 0.1}}, "model"),
    "timm": ({"state_dict": weights(), "args": argparse.Namespace(a=1), "arch": "x", "optimizer": adam()}, "state_dict"),
    "fairseq": (
        {"args": argparse.Namespace(), "model": weights(), "last_optimizer_state": adam(), "extra_state": {"x": {"a.b": ONE}}},
        "model",
    ),
    "whisper": ({"dims": {"n_mels": 80}, "model_state_dict": weights()}, "model_state_dict"),
    "model_state": ({"model_state": weights(), "optimizer_state": adam(), "it": 4}, "model_state"),
    "net": ({"net": weights(), "acc": 0.9, "epoch": 4}, "net"),
    "params_ema": ({"params_ema": weights()}, "params_ema"),
    "params": ({"params": {"w": ONE}}, "params"),
    "generator": ({"generator": {"w": ONE}, "g_optim": adam()}, "generator"),
    "nested": ({"model": {"state_dict": {"w": ONE}, "config": {"a": 1}}, "step": torch.tensor(3)}, "model.state_dict"),
    "deeper": ({"checkpoint": {"state": {"model": {"w": ONE}, "optimizer": adam()}}}, "checkpoint.state.model"),
    "another name": ({"my_weights": weights(), "epoch": 1}, "my_weights"),
    "another name, no dots": ({"mine": {"w": ONE}, "epoch": 1}, "mine"),
    "in a tuple": ((weights(), adam(), 3), "0"),
    "random states": ({"model": {"w": ONE}, "rng_state": torch.get_rng_state(), "cuda_rng_state_all": [ONE, ONE], "random": {}}, "model"),
    "scalars": ({"model": {"w": ONE}, "best": torch.tensor(0.9)}, "model"),
    "a tensor beside": ({"state_dict": weights(), "mean": ONE}, "state_dict"),
    "only a scalar": ({"state_dict": {"scale": torch.tensor(0.9)}}, "state_dict"),
    "parts": ({"backbone": {"conv": {"weight": ONE}}, "head": {"weight": ONE}}, ""),
    "parts below a name": ({"model": {"trunk": weights(), "heads": weights()}, "epoch": 1}, "model"),
    "parts called as a trainer's": ({"params": {"w": ONE, "scheduler": {"w": ONE}}}, "params"),
    "optimizer beside weights": ({"w": ONE, "optimizer": adam(), "scheduler": {"last": ONE}}, ""),
    "integers in a state dict": ({"bn.weight": ONE, "bn.num_batches_tracked": 3}, ""),
    "a list of tensors": ([ONE, torch.ones(2)], ""),
    "a part with a dot in its key": ({"a.b": {"model.c": {"w.x": ONE}}}, "a.b.model.c"),
}


@pytest.mark.parametrize("kind", FOUND)
def test_the_weights_are_found(tmp_path, kind):
    tree, root = FOUND[kind]
    contents = fmt.read(locate(saved(tmp_path / "x.pt", tree)))
    assert contents.root == root
    explicit = fmt.read(locate(tmp_path / "x.pt"), root=root)
    assert contents.entries.items() <= explicit.entries.items()
    assert bool(root) == any(repr(root) in note for note in contents.notes)
    assert not any("exp_avg" in name or "rng" in name for name in contents.entries)
    beside = set(explicit.entries) - set(contents.entries)
    trained = {"optimizer.state.0.step", "optimizer.state.0.exp_avg", "scheduler.last"}
    assert beside == (trained if kind == "optimizer beside weights" else set())


SEVERAL = {
    "basicsr": ({"params": weights(), "params_ema": weights()}, ["params", "params_ema"]),
    "gan": ({"generator": {"w": ONE}, "discriminator": {"w": ONE}, "iter": 3}, ["generator", "discriminator"]),
    "netG": ({"netG": weights(), "netD": weights()}, ["netG", "netD"]),
    "ema": ({"model": {"w": ONE}, "ema": {"w": ONE}, "optimizer": adam()}, ["model", "ema"]),
    "yolo": ({"model": torch.nn.Linear(1, 1), "ema": torch.nn.Linear(1, 1), "updates": 3}, ["model", "ema"]),
    "distilled": ({"student": weights(), "teacher": weights(), "loss": {"center": ONE}}, ["student", "teacher"]),
    "others": ({"encoder": weights(), "decoder": weights()}, ["encoder", "decoder"]),
    "a list": ([weights(), weights()], ["0", "1"]),
    "shadow": ({"model": weights(), "ema": {"decay": 0.9, "shadow": weights()}}, ["model", "ema"]),
    "nested": ({"state": {"model": weights(), "model_ema": weights()}}, ["state.model", "state.model_ema"]),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_parts_are_listed(tmp_path, kind):
    tree, roots = SEVERAL[kind]
    path = saved(tmp_path / "x.pt", tree)
    with pytest.raises(UsageError, match="several parts hold weights") as caught:
        fmt.read(locate(path))
    for root in roots:
        assert f"{root!r} (" in str(caught.value)
        contents = fmt.read(locate(path), root=root)
        assert f"{root!r} ({len(contents.entries)} tensors)" in str(caught.value)
    assert f"--set root={roots[0]} " in str(caught.value)
    assert len(fmt.read(locate(path), root="").entries) >= 2 * len(contents.entries)


TRAINING = {
    "optimizer": adam(),
    "in a dict": {"optimizer": adam(), "epoch": 3},
    "bare": {0: {"exp_avg": ONE, "exp_avg_sq": ONE}, 1: {"exp_avg": ONE}},
    "momentum": {"opt": {"state": [{"momentum_buffer": ONE}]}},
    "random states": {"rng_state": [ONE], "random_state": {"x": ONE}},
}


@pytest.mark.parametrize("kind", TRAINING)
def test_a_trainers_state_is_no_weights(tmp_path, kind):
    path = saved(tmp_path / "x.pt", TRAINING[kind])
    with pytest.raises(UsageError, match=r"none of its \d tensors is a model's.*--set root=KEY"):
        fmt.read(locate(path))
    assert fmt.read(locate(path), root="").entries


def test_roots_go_through_objects(tmp_path):
    path = saved(tmp_path / "x.pt", {"model": {"w": ONE}, "ema": argparse.Namespace(shadow={"v": ONE})})
    assert list(fmt.read(locate(path), root="ema.shadow").entries) == ["v"]
    with pytest.raises(UsageError, match=r"no key 'other' of root 'ema.other', found .'shadow'.: give"):
        fmt.read(locate(path), root="ema.other")


def test_commands_take_a_root(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tables = {"model": weights(), "ema": weights()}
    saved("both.pt", tables | {"optimizer": adam()})
    saved("ema.pt", tables["ema"])
    for command in (["inspect", "both.pt"], ["doctor", "both.pt"], ["verify", "both.pt", "ema.pt"], ["convert", "both.pt", "out"]):
        assert "'model' (2 tensors), 'ema' (2 tensors)" in refusal(capsys, *command)
        assert "no key 'nothing'" in refusal(capsys, *command, "--set", "root=nothing")
        assert run(*command, "--set", "root=ema", "--quiet") == 0
    for other in ("both.pt", "ema.pt", "out"):
        assert run("verify", "both.pt", other, "--set", "root=ema", "--quiet") == 0
        assert run("verify", "both.pt", other, "--set", "root=model", "--quiet") == (0 if other == "both.pt" else 1)
    assert run("verify", "out", "both.pt", "--set", "root=ema", "--quiet") == 0
    assert run("verify", "out", "both.pt", "--set", "root=model", "--quiet") == 1
    assert "takes root=KEY and no other option" in refusal(capsys, "inspect", "both.pt", "--set", "tied=copy")
    assert [file.local.is_absolute() for file in open_checkpoint("ema.pt").contents.files] == [True]


def test_a_root_goes_with_a_recipe(tmp_path):
    path = saved(tmp_path / "x.pt", {"model": {"a.w": ONE}, "ema": {"a.w": torch.zeros(1)}})
    rules = tmp_path / "mine.json"
    rules.write_text(json.dumps({"rules": [{"rule": "a.w", "right": "b.w"}]}))
    assert run("convert", path, tmp_path / "out", "--recipe", rules, "--set", "root=ema", "--quiet") == 0
    assert_same(read(tmp_path / "out"), {"b.w": torch.zeros(1)})


# Zips ------------------------------------------------------------------------------------------------------------------


def deflate(path, skip=lambda _: False):
    """Writes a zip again, with all entries compressed but those that are skipped."""
    packed = path.with_name(f"packed.{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w") as new:
        for info in old.infolist():
            kind = zipfile.ZIP_STORED if skip(info.filename) else zipfile.ZIP_DEFLATED
            new.writestr(info.filename, old.read(info), kind)
    return packed


def test_compressed_entries_without_data_are_read(tmp_path):
    path = saved(tmp_path / "x.pt", {"state_dict": weights(), "args": argparse.Namespace()})
    assert_holds(fmt.read(locate(deflate(path, lambda name: "/data/" in name))), torch.load(path, weights_only=False)["state_dict"])


@pytest.mark.parametrize("kind", ["plain", "objects", "program"])
def test_compressed_data_names_a_command_that_works(tmp_path, kind):
    path = tmp_path / "it's x.pt"
    if kind == "program":
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    else:
        saved(path, {"state_dict": weights()} | ({"args": Config()} if kind == "objects" else {}))
    packed = deflate(path)
    with pytest.raises(FormatError, match="storage '0' is compressed") as caught:
        fmt.read(locate(packed))
    command = str(caught.value).split("with: ")[1]
    subprocess.run(["bash", "-c", command.replace("python", sys.executable, 1)], check=True, timeout=600)
    made, expected = fmt.read(locate(tmp_path / "packed.it's x.new.pt")), fmt.read(locate(path))
    assert {name: stored(source) for name, source in made.entries.items()} == {
        name: stored(source) for name, source in expected.entries.items()
    }


def test_bombs_are_not_inflated(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive, archive.open("x/data.pkl", "w") as entry:
        for _ in range((fmt.MAX_PICKLE >> 20) + 1):
            entry.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(FormatError, match="at most 268435456"):
        fmt.read(locate(path))


def test_pickles_of_others_are_named_with_a_command_that_works(tmp_path):
    tree = {"model": {"w": np.arange(6.0).reshape(2, 3)}, "__author__": "x"}
    (tmp_path / "it's x.pkl").write_bytes(pickle.dumps(tree, protocol=4))
    for opening in (fmt.read, open_checkpoint):
        with pytest.raises(FormatError, match=r"pickle that torch.save did not write, of .'model', '__author__'. with .*numpy") as caught:
            opening(locate(tmp_path / "it's x.pkl"))
    command = re.search(r"python (-c .*) makes it readable", str(caught.value))
    subprocess.run([sys.executable, *shlex.split(command[1])], check=True, timeout=600)
    assert_holds(fmt.read(locate(tmp_path / "it's x.pkl.pt")), {"w": torch.from_numpy(tree["model"]["w"])})


def test_a_module_pickled_by_itself_is_named(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"G": Model(), "D": Config()}))
    with pytest.raises(FormatError, match=r"a pickle that torch\.save did not write, of .*test_pickles\.Config"):
        fmt.read(locate(tmp_path / "x.pkl"))


# Hostile pickles ---------------------------------------------------------------------------------------------------------


MARK = pathlib.Path(tempfile.gettempdir(), f"streamconv-ran-{os.getpid()}")
SHELL = f"touch {MARK}".encode()


def text(raw):
    return b"X" + len(raw).to_bytes(4, "little") + raw


RUNS = {
    "reduce": b"cos\nsystem\n" + text(SHELL) + b"\x85R",
    "stack global": text(b"os") + text(b"system") + b"\x93" + text(SHELL) + b"\x85R",
    "inst": b"(" + text(SHELL) + b"ios\nsystem\n",
    "obj": b"(cos\nsystem\n" + text(SHELL) + b"o",
    "new": b"csubprocess\nPopen\n" + text(SHELL) + b"\x85\x81",
    "new with keywords": b"csubprocess\nPopen\n" + text(SHELL) + b"\x85}" + text(b"shell") + b"\x88s\x92",
    "build": b"cbuiltins\nobject\n)\x81}" + text(b"__class__") + b"cos\nsystem\nsb",
    "call of a call": b"cbuiltins\ngetattr\ncos\n__dict__\n" + text(b"system") + b"\x86R" + text(SHELL) + b"\x85R",
    "eval": b"cbuiltins\neval\n" + text(b"__import__('os').system('" + SHELL + b"')") + b"\x85R",
    "loads": b"cpickle\nloads\n" + text(b"cos\nsystem\n") + b"\x85R",
    "torch load": b"ctorch.storage\n_load_from_bytes\n" + text(SHELL) + b"\x85R",
    "module": b"cno_such_module_anywhere\nThing\n)R",
    "setstate": b"cfunctools\npartial\ncos\nsystem\n\x85R(cos\nsystem\n" + text(SHELL) + b"\x85}Ntb",
    "items": b"ccollections\ndefaultdict\ncos\nsystem\n\x85RK\x01K\x02s",
    "in a set": b"\x8f(cos\nsystem\n" + text(SHELL) + b"\x85R\x90",
    "as a key": b"}cos\nsystem\n" + text(SHELL) + b"\x85RNs",
}


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("deep", [False, True])
def test_nothing_of_what_is_left_out_runs(tmp_path, kind, deep):
    MARK.unlink(missing_ok=True)
    path = saved(tmp_path / "x.pt", {"model": {"w": ONE}})
    assert_holds(fmt.read(locate(path)), {"w": ONE})
    with zipfile.ZipFile(path) as archive:
        raw = archive.read("x/data.pkl").removesuffix(b".")
    value = b"(}" + text(b"k") + RUNS[kind] + b"sl" if deep else RUNS[kind]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", raw + text(b"bad") + value + b"s.")
        archive.writestr("x/data/0", bytes_of(ONE))
    before = {*sys.modules, "encodings.cp437"}  # which zipfile takes
    contents = fmt.read(locate(path))
    assert_holds(contents, {"w": ONE})
    assert contents.left_out == ["bad"]
    assert not MARK.exists()
    assert set(sys.modules) <= before
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


COUNT = 100_000  # where 4 MiB are allowed
COLLIDING = b"".join(b"\x8a\x10" + ((2**61 - 1) * number).to_bytes(16, "little") + b"N" for number in range(COUNT))
BOMBS = {
    "dicts": b"](" + b"}" * COUNT + b"e",
    "lists": b"(" + b"]" * COUNT + b"l",
    "sets": b"(" + b"\x8f" * COUNT + b"l",
    "tuples": b"(" + b"N\x85" * COUNT + b"l",
    "marks": b"(" * COUNT,
    "numbers": b"(" + b"J\xff\xff\xff\x7f" * COUNT * 2 + b"l",
    "floats": b"(" + b"G12345678" * COUNT * 2 + b"l",
    "long numbers": b"(" + (b"\x8b\x00\x04\x00\x00" + b"\x7f" * 1024) * (COUNT // 10) + b"l",
    "texts": b"(" + b"\x8c\x02ab" * COUNT + b"l",
    "wide texts": b"(" + (b"X\x00\xff\x00\x00" + b"\xf0\x9f\x98\x80" + b"a" * (0xFF00 - 4)) * 100 + b"l",
    "names": b"(" + b"cab\ncd\n" * COUNT + b"l",
    "objects": b"(" + b"cab\ncd\n)\x81" * COUNT + b"l",
    "memo": b"N" + b"\x94" * COUNT * 6,
    "copies": b"](" + b"N" * 10_000 + b"eq\x00" + b"ctorch\nSize\nh\x00\x85R" * 100,
    "nested": b")" + b"\x85" * COUNT,
    "keys": b"}(" + b"".join(b"J" + number.to_bytes(4, "little") + b"N" for number in range(COUNT)) + b"u",
    "colliding keys": b"}(" + COLLIDING + b"u",
    "numbers in a set": b"\x8f(" + b"J\xff\xff\xff\x7f" * COUNT * 2 + b"\x90",
    "storages": b"((" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + b"NK\x01tq\x000" + b"h\x00Q" * COUNT + b"l",
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", BOMBS)
def test_what_a_pickle_may_make_is_bounded(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(unpickling, "MAX_MADE", 4 << 20)
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + BOMBS[kind] + b".")
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="its objects take more than 4 MiB"):
            fmt.read(locate(path))
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()


def test_the_bound_is_far_from_real_files(tmp_path, monkeypatch):
    """As much as 300000 tensors take, counted in hundredths."""
    monkeypatch.setattr(unpickling, "MAX_MADE", unpickling.MAX_MADE // 100)
    tree = {f"model.layers.{number}.self_attn.q_proj.weight": torch.ones(1) for number in range(3000)}
    assert len(fmt.read(locate(saved(tmp_path / "x.pt", tree))).entries) == 3000
    assert len(fmt.read(locate(saved(tmp_path / "y.pt", {"model": tree}, **LEGACY))).entries) == 3000
