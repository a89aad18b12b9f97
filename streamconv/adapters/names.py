"""A model's tensors under the names that an adapter has for them: transformers holds some models under others than their files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from streamconv.adapters.folder import Adapter
from streamconv.adapters.keys import Contents
from streamconv.adapters.ties import is_of_words
from streamconv.adapters.weights import Weights
from streamconv.errors import CoverageError, UsageError
from streamconv.graph.node import AnyNode, Node
from streamconv.library.foreign import make_foreign
from streamconv.library.model import LibraryModel


def with_names(adapter: Adapter, contents: Contents, weights: Weights) -> Weights:
    """The weights under names of which an adapter's are; as they are, where these fit, or no others do."""
    if not _lacks(contents, weights.entries):
        return weights
    config = {key: value for key, value in weights.config.items() if key != "quantization_config"}
    try:
        model = LibraryModel(config, adapter.title)
        natives, _, _ = model.load(weights.entries, make_foreign)
        if not _lacks(contents, natives):
            return _Renamed(weights, natives, model, is_native=True)
        stored, _ = model.save(weights.entries)
        if not _lacks(contents, stored):
            return _Renamed(weights, stored, model, is_native=False)
    except (CoverageError, UsageError) as error:  # weights say what does not fit
        if isinstance(error.__cause__, ImportError):
            weights.hint = f"; others that it may have are transformers': {error}"
    return weights


def _lacks(contents: Contents, entries: Mapping[str, AnyNode]) -> bool:
    """Whether any of an adapter's names is that of no tensor, but for words, which may be tied."""
    parents = {name.rpartition(".")[0] for name in entries}
    modules = [layer.module for layer in contents.layers]
    names = [*(f"{module}.weight" for module in modules if module not in parents), *contents.whole, *contents.under]
    return any(name not in entries and not is_of_words(name) for name in names)


class _Renamed(Weights):
    """Weights under names of transformers, which go back to those of the files with `conclude`."""

    def __init__(self, weights: Weights, entries: Mapping[str, AnyNode], model: LibraryModel, *, is_native: bool) -> None:
        super().__init__(entries, weights.config, weights.recast)
        self._weights, self._model, self._is_native = weights, model, is_native
        self._before = dict(entries)

    def conclude(self, title: str) -> None:
        """Has what has become of them in the place of the stored ones.

        Raises:
            CoverageError: they cannot be taken back to the names of the files.
            UsageError: see `Weights.conclude`.
        """
        files = {id(node): name for name, node in self._weights.entries.items()}
        own = {name: files.get(id(self._before[name])) if name in self._before else None for name in self.changed}
        others = {id(self.entries[name]): self.changed[name] for name, stored in own.items() if stored is None}
        changes = {stored: (self.entries[name], self.changed[name]) for name, stored in own.items() if stored is not None}
        if others:
            ends = others.keys() | set(map(id, self.entries.values()))
            for name, node in self._stored().items():
                how = next((others[end] for end in _reach(node, ends) if end in others), None)
                if how is not None:
                    changes[name] = node, how
        come = {self._name_of(name): embedding for name, embedding in self.former.items()}
        for name, (node, how) in changes.items():
            if name not in self._weights.entries and name not in come:
                raise CoverageError(f"{title}: transformers would store {name}, which SRC has not: convert it to that layout first")
            self._weights.set(name, node, how)
        self._weights.replaced |= {own.get(name) or name for name in self.replaced}
        self._weights.conclude(title)
        self._weights.config_changes |= self.config_changes
        self._weights.former |= {name: files[id(self._before[embedding])] for name, embedding in come.items()}

    def _stored(self) -> Mapping[str, AnyNode]:
        return self._model.save(self.entries)[0] if self._is_native else self._model.load(self.entries, make_foreign)[0]

    def _name_of(self, name: str) -> str:
        """What one that has come is called in files."""
        node = self.entries[name]
        return next((stored for stored, other in self._stored().items() if other is node), name)


def _reach(node: AnyNode, ends: Iterable[int]) -> Iterable[int]:
    """Which of some nodes, by their ids, a node is made of; what those are made of does not count."""
    stack = [node]
    while stack:
        node = stack.pop()
        if id(node) in ends:
            yield id(node)
        elif isinstance(node, Node):
            stack.extend(node.inputs)
