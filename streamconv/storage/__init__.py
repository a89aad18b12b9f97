"""Where files are: paths of this machine, and URLs. Nothing of what URLs take is imported before one is used."""

from __future__ import annotations


def is_url(path: object) -> bool:
    """Whether a path names something behind a protocol, such as ``https://`` or ``s3://``."""
    return "://" in str(path)
