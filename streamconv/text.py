"""Text that came out of files, as people may see it.

Names of tensors and files, metadata, values of configs: whoever made a checkpoint chose them. Printed as they are they could move a
terminal's cursor, break a line in two, or show in another order than they are read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{1,3}[^\s\"'<>]*")
_LOGIN = re.compile(r"(?P<start>:/{1,3})(?:[^\s@/]*:(?!\d+(?:/|$))[^\s@]*|[^\s@/]+)@")
_SECRET = re.compile(
    r"(?P<key>(?:^|(?<=[?&;\s'\"=]))(?:x-(?:amz|goog)-[\w-]+|sig|signature|awsaccesskeyid|[\w-]*(?:token|secret|password|credential)))=[^\s&;'\"]+",
    re.IGNORECASE,
)


def one_line(text: object) -> str:
    """A text with escapes for what is not printable: controls, line ends of every kind, marks of direction, half characters."""
    line = str(text)
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def join_lines(lines: Iterable[object]) -> str:
    """Lines under each other, of which each is one line, whatever is in it."""
    return "\n".join(map(one_line, lines))


def did_you_mean(word: str, names: Iterable[str], n: int = 1) -> str:
    """``; did you mean A?``, or of ``n`` names, of what is spelt like something that was given; nothing where nothing is."""
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word[:200].lower(), by_lower, n, cutoff=0.6)
    return f"; did you mean {' or '.join(by_lower[name] for name in near)}?" if near else ""


def without_secrets(text: str) -> str:
    """A text in which URLs have no query, no fragment and no name or password, and other parts of a signature no value."""
    if "=" not in text and ":/" not in text:
        return text
    return _SECRET.sub(r"\g<key>=...", _URL.sub(lambda match: _without_query(match[0]), text))


def _without_query(url: str) -> str:
    rest = re.split(r"[?#]", url, maxsplit=1)
    mark = url[-1] if len(rest) > 1 and url[-1] in ":;,.)" else ""  # which ends the sentence, not the URL
    if rest[0].startswith("hf:") and ":" not in rest[0][3:]:  # an @ names a revision
        return rest[0] + mark
    return _LOGIN.sub(r"\g<start>", rest[0]) + mark
