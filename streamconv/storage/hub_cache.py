"""The Hub's cache on this machine, given as a path: ``models--org--name`` with its snapshots, or the folder that holds several."""

from __future__ import annotations

import re
from pathlib import Path

from streamconv.errors import UsageError

_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_REF = 256


def find_snapshot(path: Path) -> Path | None:
    """The newest snapshot of a repository in the cache, or of the only one in the cache's folder; None where this is no cache.

    Raises:
        UsageError: there is no snapshot, or several repositories.
    """
    if (path / "snapshots").is_dir() and (_REPOSITORY.fullmatch(path.name) or (path / "refs").is_dir()):
        return _newest(path)
    try:
        repositories = sorted(
            folder.name for folder in path.iterdir() if _REPOSITORY.fullmatch(folder.name) and (folder / "snapshots").is_dir()
        )
    except OSError:
        return None
    if len(repositories) > 1:
        more = f" and {len(repositories) - 6} more" if len(repositories) > 6 else ""
        raise UsageError(
            f"{path}: the Hub's cache, with {len(repositories)} repositories: {', '.join(repositories[:6])}{more}: give the path of one"
        )
    return _newest(path / repositories[0]) if repositories else None


def _newest(repository: Path) -> Path:
    """The snapshot that ``refs/main`` names, else the one that was made last."""
    snapshots = repository / "snapshots"
    commit = ""
    main = repository / "refs" / "main"
    if main.is_file():
        with main.open("rb") as file:
            commit = file.read(_MAX_REF).decode("utf-8", "replace").strip()
    if commit and "/" not in commit and commit not in (".", "..") and (snapshots / commit).is_dir():
        return snapshots / commit
    folders = [folder for folder in snapshots.iterdir() if folder.is_dir()]
    if not folders:
        raise UsageError(f"{repository}: the Hub's cache of a repository, with no snapshot in it: download the repository again")
    return max(folders, key=lambda folder: (folder.stat().st_mtime_ns, folder.name))


def hint(text: str) -> str:
    """What to say of a path that is not there and looks like the name of a repository on the Hub."""
    return f", or hf://{text} for the repository on the Hub" if _NAME.fullmatch(text) else ""
