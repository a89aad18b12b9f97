"""Names of files that recipes, configs, indices, plans and servers give: only those below a folder are read or written."""

from __future__ import annotations

LONGEST = 255  # bytes of a name in a folder, on the file systems there are


def find_fault(path: str) -> str | None:
    """What keeps a text from being the path of a file below a folder, in words; None if nothing does.

    Its parts stand between slashes. Whether one of them is a link is for the file system to say.
    """
    if not path:
        return "is empty"
    if path.startswith("/"):
        return "is absolute"
    if "\0" in path or "\\" in path:
        return "has a NUL or a backslash in it"
    parts = path.split("/")
    if ".." in parts:
        return "leads out of its folder"
    if "" in parts or "." in parts:
        return "has an empty part"
    try:
        longest = max(len(part.encode("utf-8", "surrogateescape")) for part in parts)
    except UnicodeEncodeError as error:
        return f"holds {error.object[error.start]!r}, which is no character"
    if longest > LONGEST:
        return f"has a part of more than {LONGEST} bytes"
    return None
