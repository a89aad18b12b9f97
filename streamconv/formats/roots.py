"""The tree that a pickle describes: what lies below what, and which part of it is the weights of a model."""

from __future__ import annotations

import math
import re
from collections.abc import ItemsView, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from streamconv.errors import FormatError, UsageError
from streamconv.formats.files import damaged, short, show
from streamconv.formats.pickles import Odd, Sharded, Storage, Tensor, unpickle
from streamconv.formats.unpickling import ATOMS, Budget, Global, Inert
from streamconv.formats.zips import open_section
from streamconv.storage.folder import File, Location

_MAX_NAMES = 1 << 27  # bytes that the names of a tree's leaves may take, with what is kept of each
_MAX_DEPTH = 1 << 10
_MAX_KEYS = 100  # of a root
_MAX_KEY = 200  # characters of a key that is looked at for words
_MAX_LOOKS = 100_000  # nodes that are looked at for a message
_MAX_MEMBERS = 1 << 18  # of a list that is looked into
_LEAF = 256
_PLAIN = "set frozenset str bytes bytearray complex object dict list"
_PLAIN_KINDS = {f"builtins.{name}" for name in _PLAIN.split()}
_PLAIN_KINDS |= {"_codecs.encode", "collections.Counter", "torch.device", "torch.serialization._get_layout"}

# Names of what is beside weights in checkpoints of trainers; never weights.
_TRAINING = re.compile(
    r"opts?|opt_.*|.*optim.*|.*sched.*|.*scaler.*|(.*[_.-])?rng([_.-].*)?|(.*_)?random(_.*)?states?"
    r"|callbacks|loops|hyper_?parameters|hparams.*|(\w+_)?args|extra_state|.*_history|data_?loader.*|train(er|ing)?_?state.*|chained_\d+"
    r"|rerun_state_machine_state",
    re.IGNORECASE | re.DOTALL,
)
# Names of what optimizers keep for each parameter.
_SLOTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "exp_inf", "prev_grad"}
# Words that a key of a whole set of weights has in it.
_WEIGHTS = {
    "model", "models", "module", "net", "network", "params", "weights", "ema", "generator", "discriminator", "g", "d", "netg", "netd",
    "student", "teacher", "actor", "critic", "policy",
}  # fmt: skip
_WORDS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A part of the tree that may be the weights: its keys from the top, and how it is known to be.

    ``named``: its key says so; ``real``: it is a module, or has a dict with the dotted names that modules give; ``flat``: it holds tensors
    itself, not only by what is in it.
    """

    keys: tuple[str, ...]
    node: Any
    named: bool
    real: bool = False
    flat: bool = True

    @property
    def root(self) -> str:
        return ".".join(self.keys)


# What lies below what ------------------------------------------------------------------------------------------------


def is_module(node: Any) -> bool:
    """Whether a node stands for a torch.nn.Module."""
    return type(node) is Inert and all(type(node.attribute(name)) is dict for name in ("_parameters", "_buffers", "_modules"))


class _Numbered:
    """The members of a list under their numbers, which are not made before they are asked for."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((str(number), value) for number, value in enumerate(self._values))


Pairs = ItemsView[str, Any] | list[tuple[str, Any]] | _Numbered


def children(node: Any) -> Pairs | None:
    """What a container holds by name, a module as its state dict calls it; None for what is none, such as a list of plain values."""
    if type(node) is dict:
        return node.items()
    if type(node) in (list, tuple):
        return None if len(node) > _MAX_MEMBERS or all(map(_is_plain, node)) else _Numbered(node)
    if is_module(node):
        return _of_module(node)
    if type(node) is Inert and node.items is not None:
        return node.items.items()
    return None


def _is_plain(value: Any) -> bool:
    if type(value) is Inert:
        return value.items is None and not is_module(value)
    return type(value) in ATOMS or type(value) in (Global, Storage)


def _of_module(module: Inert) -> list[tuple[str, Any]]:
    passing = module.attribute("_non_persistent_buffers_set")
    left_out = set(_elements(passing)) if type(passing) is Inert else set()
    members = list(module.attribute("_parameters").items())
    members += [(name, value) for name, value in module.attribute("_buffers").items() if name not in left_out]
    members += module.attribute("_modules").items()
    return [(name, value) for name, value in members if value is not None]


def _elements(group: Inert) -> Iterator[str]:
    """The names in a set, whichever way a pickle made it."""
    members = group.args[0] if group.args and type(group.args[0]) in (list, tuple) else []
    yield from (element for element in [*members, *(group.elements or [])] if type(element) is str)


def leaves(path: Location, tree: Any, without: Iterable[str] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted names and what they stand for, in order; a list of plain values counts as one.

    Args:
        path: the file, for messages.
        tree: where to start.
        without: names directly below it that are passed over.

    Raises:
        FormatError: the tree contains itself, or has more leaves than can be listed.
    """
    budget, passed = _MAX_NAMES, set(without)
    below = children(tree)
    if below is None:
        yield "", tree
        return
    waiting = [("", iter(below))]
    while waiting:
        prefix, pairs = waiting[-1]
        key, node = next(pairs, (None, None))
        if key is None:
            waiting.pop()
            continue
        if not prefix and key in passed:
            continue
        name = f"{prefix}{key}"
        budget -= len(name) + _LEAF
        if budget < 0 or len(waiting) > _MAX_DEPTH:
            raise damaged(path, "its dicts and lists contain themselves or more than can be listed")
        below = children(node)
        if below is None:
            yield name, node
        else:
            waiting.append((f"{name}.", iter(below)))


def kinds(nodes: Iterable[Any]) -> list[str]:
    """Classes of objects and functions in parts of a tree; not all, if there are very many."""
    names: dict[str, None] = {}
    for node in _all_below(nodes):
        if type(node) is Inert:
            names.setdefault(node.kind)
        elif type(node) is Global:
            names.setdefault(node.name)
        elif type(node) is Odd:
            names.setdefault(node.maker)
    return sorted(name for name in names if name not in _PLAIN_KINDS)


def count_tensors(nodes: Iterable[Any]) -> int:
    """How many tensors there are in parts of a tree, in objects too; not all, if there are very many."""
    return sum(_is_tensor(node) for node in _all_below(nodes))


def measure_tensors(nodes: Iterable[Any]) -> tuple[int, int]:
    """How many tensors there are in parts of a tree, and their bytes; not all, if there are very many."""
    tensors = [node for node in _all_below(nodes) if type(node) in (Tensor, Sharded)]
    return len(tensors), sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)


def _all_below(nodes: Iterable[Any]) -> Iterator[Any]:
    """Everything in parts of a tree, what objects were made of too, each once; so much of it as can be looked at for a message."""
    ids: set[int] = set()
    waiting = list(islice(nodes, _MAX_LOOKS))
    while waiting and len(ids) < _MAX_LOOKS:
        node = waiting.pop()
        yield node
        if type(node) is Inert:
            below: Iterable[Any] = (node.args, node.state, node.items, node.elements)
        elif type(node) is dict:
            below = node.values()
        else:
            below = node if type(node) in (list, tuple) else ()
        if id(node) not in ids and below:
            ids.add(id(node))
            room = _MAX_LOOKS * 10 - len(waiting)
            waiting += islice((value for value in below if type(value) not in ATOMS), max(0, room))


# Where the weights are -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Weights:
    """The part of a tree that is taken for the weights.

    Attributes:
        keys: where it is.
        tree: what it is.
        named: its leaves by dotted names, in order.
        left_out: what is beside it, by dotted names.
    """

    keys: tuple[str, ...]
    tree: Any
    named: list[tuple[str, Any]]
    left_out: list[tuple[str, Any]]

    @property
    def root(self) -> str:
        return ".".join(self.keys)


def note_root(root: str) -> list[str]:
    """The note on the key that tensors were found below; none where that is the whole file."""
    return [f"the tensors are those below {root!r} (--set root=KEY takes others, --set root= all)"] if root else []


def find_weights(path: Location, whole: Any, root: str | None) -> Weights:
    """What lies below a root, or where the weights are.

    Raises:
        FormatError: there is no tensor, or a tree that contains itself.
        UsageError: there is no such root, or several parts may be the weights.
    """
    keys = find(path, whole).keys if root is None else keys_of(path, whole, root)
    tree, beside = follow(whole, keys)
    trained = training_parts(tree, by_name=not keys) if root is None else []
    named = list(leaves(path, tree, [name for name, _ in trained]))
    return Weights(keys, tree, named, [*beside, *((".".join([*keys, name]), part) for name, part in trained)])


def keys_of(path: Location, tree: Any, root: str) -> tuple[str, ...]:
    """The keys that a dotted root consists of: a key may have dots itself.

    Raises:
        UsageError: there is no such part of the tree.
    """
    keys: list[str] = []
    rest = root
    while rest:
        below = _by_name(tree)
        fitting = [(key, value) for key, value in below if rest == key or rest.startswith(f"{key}.")]
        if not fitting:
            names = short.repr(_first_names(below) or type(tree).__name__)
            key = rest.partition(".")[0]
            raise UsageError(f"{show(path)}: no key {short.repr(key)} of root {short.repr(root)}, found {names}: give one of those")
        key, tree = max(fitting, key=lambda pair: len(pair[0]))
        keys.append(key)
        rest = rest[len(key) + 1 :]
    return tuple(keys)


def follow(tree: Any, keys: Sequence[str]) -> tuple[Any, list[tuple[str, Any]]]:
    """The part of a tree under some keys, and what lies beside it on the way, by dotted names."""
    beside: list[tuple[str, Any]] = []
    for depth, key in enumerate(keys):
        below = _by_name(tree)
        others = ((".".join([*keys[:depth], other]), value) for other, value in below if other != key)
        beside += islice(others, _MAX_LOOKS)
        tree = next(value for name, value in below if name == key)
    return tree, beside


def _by_name(node: Any) -> Pairs:
    """What lies below a node, its attributes if it is an object."""
    below = children(node)
    if below is None and type(node) is Inert:
        below = list(chain.from_iterable(attributes.items() for attributes in node.attributes()))
    return below or []


def _first_names(below: Pairs) -> list[str]:
    return [name for name, _ in islice(below, 8)]


def find(path: Location, tree: Any) -> Candidate:
    """The part of a tree that is the weights.

    Raises:
        FormatError: there is none.
        UsageError: there are several, or only the state of a trainer.
    """
    if _is_tensor(tree):
        return Candidate((), tree, named=False)
    candidates = _candidates(tree, (), objects=False, seen=set()) or _candidates(tree, (), objects=True, seen=set())
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        choices = ", ".join(f"{short.repr(one.root)} ({count_tensors([one.node])} tensors)" for one in candidates[:8])
        more = f" and {len(candidates) - 8} more" if len(candidates) > 8 else ""
        raise UsageError(
            f"{show(path)}: several parts hold weights: {choices}{more}: say which with --set root={candidates[0].root} or another of them "
            "(--set root= takes all)"
        )
    count = count_tensors([tree])
    if count:
        raise UsageError(
            f"{show(path)}: none of its {count} tensors is a model's, they are the state of an optimizer or a trainer; found "
            f"{describe(tree)}: "
            "give another file, or --set root=KEY for a part of this one"
        )
    raise FormatError(f"{show(path)}: no tensor in it, found {describe(tree)}: give another file")


def describe(tree: Any) -> str:
    """The first names in a tree, and classes of objects in it, for a message."""
    names = _first_names(_by_name(tree))
    clauses = []
    if names:
        clauses.append(short.repr(names))
    elif type(tree) not in (Inert, Global):
        clauses.append(f"a {type(tree).__name__}")
    objects = ", ".join(short.repr(kind)[1:-1] for kind in kinds([tree])[:6])
    if objects:
        clauses.append(f"objects of {objects}, which are not made")
    return " with ".join(clauses) or "plain values"


def describe_pickle(path: Location, file: File, nbytes: int) -> str:
    """What a pickle is that torch.save did not write."""
    what = "a pickle that torch.save did not write"
    try:
        tree = unpickle(path, open_section(file, 0, nbytes), {}, Budget())
    except FormatError:
        return what
    return f"{what}, of {describe(tree)}"


def _candidates(node: Any, keys: tuple[str, ...], *, objects: bool, seen: set[int]) -> list[Candidate]:
    """The parts of a node that may be weights; with ``objects`` also those that attributes of objects hold."""
    below = _by_name(node) if objects and not is_module(node) else children(node)
    if not below or id(node) in seen or len(keys) > _MAX_KEYS:
        return []
    seen.add(id(node))  # what lies at two places is listed once
    named = _is_named(keys[-1]) if keys else False
    if is_module(node):
        return [Candidate(keys, node, named, real=True)]
    if _is_training(node):
        return []
    tensors = [(name, value) for name, value in below if _is_tensor(value)]
    whole = Candidate(keys, node, named, real=any("." in name for name, _ in tensors), flat=bool(tensors))
    holds = any(not _is_scalar(value) and not is_trainers(name) for name, value in tensors)
    if whole.real or (holds and named):
        return [whole]
    inner: list[Candidate] = []
    for name, value in below:
        if type(value) not in ATOMS and not is_trainers(name):
            inner += _candidates(value, (*keys, name), objects=objects, seen=seen)
    if holds:  # what else could be the weights, if it does not say that it is
        return [one for one in inner if one.named and one.real] or [whole]
    if not inner and tensors and (named or not keys):
        return [whole]
    return _choose(whole, inner, alone=len(below) == 1)


def _choose(whole: Candidate, inner: list[Candidate], *, alone: bool) -> list[Candidate]:
    """Of what lies below a node those that are weights by themselves, or the node, if they are its parts."""
    named = [one for one in inner if one.named]
    if whole.named and not (named and len(named) == len(inner)):
        return [replace(whole, real=any(one.real for one in inner))] if inner else []
    if named or (inner and all(one.real for one in inner)):
        strong = [one for one in inner if one.named or one.real]
        return [one for one in strong if one.real or one.flat] or strong
    if len(inner) == 1 and not whole.keys and not alone:
        return inner
    return [whole] if inner else []


def _is_named(key: str) -> bool:
    return len(key) <= _MAX_KEY and ("state_dict" in key.lower() or not _WEIGHTS.isdisjoint(word.lower() for word in _WORDS.split(key)))


def is_trainers(key: str) -> bool:
    """Whether a key is what trainers call something that is no model's."""
    return len(key) <= _MAX_KEY and _TRAINING.fullmatch(key) is not None


def _is_tensor(value: Any) -> bool:
    return type(value) in (Tensor, Odd, Sharded)


def maker_of(leaf: Any) -> str | None:
    """What would have made a tensor that is not plain bytes; None for all else."""
    if type(leaf) is Odd:
        return leaf.maker
    if type(leaf) is Sharded:
        return leaf.kind
    holds_tensor = type(leaf) is Inert and any(type(value) is Tensor for value in leaf.args)
    return leaf.kind if holds_tensor else None


def _is_scalar(value: Any) -> bool:
    return type(value) is Tensor and not value.shape


def _is_training(node: Any) -> bool:
    """Whether a node is the state of an optimizer, or what one keeps for a parameter."""
    if type(node) is Inert:
        return node.attribute("state") is not None and node.attribute("param_groups") is not None
    if type(node) is not dict:
        return False
    return ("state" in node and "param_groups" in node) or any(_is_tensor(node.get(name)) for name in _SLOTS)


def training_parts(node: Any, *, by_name: bool) -> list[tuple[str, Any]]:
    """What lies directly below a node and is a trainer's state, by what it is made of and, with ``by_name``, by what it is called."""
    if is_module(node):
        return []
    parts = []
    for name, value in children(node) or ():
        is_training = _is_training(value) or (by_name and _is_called_so(name, value))
        if is_training and count_tensors([value]):
            parts.append((name, value))
    return parts


def _is_called_so(name: str, value: Any) -> bool:
    if type(value) is Tensor:
        return value.dtype.name == "uint8" and "." not in name and is_trainers(name)
    return is_trainers(name) and children(value) is not None and not is_module(value)
