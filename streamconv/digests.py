"""What can be written into a file only when its data is there: checksums of ranges of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Checksum:
    """Bytes of a file that follow from others; see `patches`.

    ``crc32``: the CRC-32 of ``nbytes`` bytes at ``start``, little-endian, goes to each of ``positions``.
    ``torch-id``: these bytes become ``prefix`` and twenty digits, torch's hash of the file's CRC-32s (those before the tensors are
    in ``seed``, those after them in ``tail``); then the CRC-32 of these bytes goes to ``positions``, too.
    """

    kind: str
    start: int
    nbytes: int
    positions: tuple[int, ...]
    seed: int = 0
    tail: tuple[int, ...] = ()
    prefix: bytes = b""


class Crc32:
    """CRC-32s as `hashlib` makes digests: enough to find damage, at a third of a SHA-256's cost. Their texts say what they are."""

    PREFIX = "crc32:"

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview) -> None:
        """Takes more bytes in."""
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        """The digest of all so far."""
        return f"{self.PREFIX}{self._value:08x}"


def combine(seed: int, crc: int) -> int:
    """c10::hash_combine, in 64 bits."""
    return seed ^ ((crc + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & (1 << 64) - 1)


def patches(checksums: Sequence[Checksum], crcs: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """What to write where, given the CRC-32 of the bytes of each ``crc32`` entry, in order."""
    values = iter(crcs)
    for checksum in checksums:
        if checksum.kind == "crc32":
            crc = next(values)
        else:
            seed = checksum.seed
            for crc in (*crcs, *checksum.tail):
                seed = combine(seed, crc)
            text = checksum.prefix + b"%020d" % seed
            yield checksum.start, text
            crc = zlib.crc32(text)
        for position in checksum.positions:
            yield position, crc.to_bytes(4, "little")


def places_of(checksums: Sequence[Checksum]) -> list[tuple[int, int]]:
    """Start and length of all that `patches` writes."""
    return [(start, len(data)) for start, data in patches(checksums, [0] * len(checksums))]


def read_patches(checksums: Sequence[Checksum], read: Callable[[int, memoryview], None], buffer: memoryview) -> Iterator[tuple[int, bytes]]:
    """`patches` of a file, whose bytes ``read(offset, view)`` gives; ``buffer`` is all the memory that takes."""
    crcs = []
    for checksum in checksums:
        if checksum.kind == "crc32":
            crc, end = 0, checksum.start + checksum.nbytes
            for start in range(checksum.start, end, len(buffer)):
                piece = buffer[: end - start]
                read(start, piece)
                crc = zlib.crc32(piece, crc)
            crcs.append(crc)
    return patches(checksums, crcs)


def format_sums(sums: Mapping[str, str], previous: bytes = b"") -> bytes:
    """Names and SHA-256s in the form that ``sha256sum --check`` reads; of ``previous``, which is in it, the lines of other files stay.

    Names are bytes to it: those that are no text, which Python has as half characters, come out as they are.
    """
    lines = {_name_of(line): line for line in previous.decode("utf-8", "surrogateescape").split("\n") if line}
    for name, digest in sums.items():
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
        lines[escaped] = f"{chr(92) if escaped != name else ''}{digest}  {escaped}"
    return "".join(f"{line}\n" for line in lines.values()).encode("utf-8", "surrogateescape")


def _name_of(line: str) -> str:
    return line.partition(" ")[2][1:]
