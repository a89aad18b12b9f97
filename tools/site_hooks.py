"""Hooks of the site's builder: what pages link to outside docs/, so that the same links work on a page of the repository.

``mkdocs build`` loads it (see mkdocs.yml).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PICTURES = sorted((ROOT / "benchmarks" / "results").glob("*.png"))
LINK = re.compile(r"\]\(\.\./(?P<path>[^)]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the benchmarks' pictures."""
    for path in PICTURES:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001
    """Leads links to files of the repository there, and those to pictures to the site's own."""

    def lead(match: re.Match[str]) -> str:
        path = match["path"]
        is_picture = any(path == picture.relative_to(ROOT).as_posix() for picture in PICTURES)
        return f"]({path})" if is_picture else f"]({config.repo_url}/blob/main/{path})"

    return LINK.sub(lead, markdown)
