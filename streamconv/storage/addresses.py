"""URLs as everybody may see them and as servers are asked, and what to say of those that lead nowhere.

The URLs that the rest of the package sees are public ones: a query, which may be a signature or a token, stays in this process's memory
(`public`) and is put back when a server is asked (`private`).
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple
from urllib.parse import unquote

from streamconv.errors import DestinationError, RunError, StreamconvError, UsageError
from streamconv.text import one_line

WEB = ("http", "https")
_OURS = ("fsspec", "requests", "huggingface_hub", "s3fs", "gcsfs", "aiohttp")  # packages of the extra
_HOW = {  # credentials are given
    "hf": "set HF_TOKEN to a token that may read it, and accept the model's terms on its page if it has any",
    "http": "give a signed URL that is still valid (signatures are not kept in plans), or put a login into ~/.netrc",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (and AWS_ENDPOINT_URL for a server of your own)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud",
}
_SAME = {"https": "http", "s3a": "s3", "gcs": "gs"}
_HUB = re.compile(
    r"hf://(?:(?:models|(?P<kind>dataset|space)s)/)?(?P<id>[^/@]+(?:/[^/@]+)?)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_PAGE = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/(?P<id>[^/?#]+/[^/?#]+)(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+)(?P<path>/[^?#]*)?)?/?(?:[?#].*)?"
)

_queries: dict[str, str] = {}


def scheme_of(url: str) -> str:
    """What stands before the ``://``, in small letters."""
    return url.partition("://")[0].lower()


def public(url: str) -> str:
    """A URL without its query, which is kept for `private`.

    Raises:
        UsageError: it is nothing but a scheme, or has a user's name or password in it, or a query where there can be none.
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    rest, _, query = rest.partition("#")[0].partition("?") if scheme in WEB else rest.partition("?")
    host, slash, path = rest.partition("/")
    if not rest.strip("/"):
        raise UsageError(f"{scheme}://: names no place: give a URL with a bucket, a repository or a server in it")
    if "@" in host and (scheme != "hf" or ":" in host):
        address = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
        raise UsageError(
            f"{address}: the URL has a name or password in it, which would end up in logs: leave it out, {credentials(scheme)}"
        )
    url = f"{scheme}://{rest}"
    if query and scheme not in WEB:
        raise UsageError(f"{url}: a {scheme}:// URL has no query (what follows a ?): leave it out")
    if query:
        _queries[url.rstrip("/")] = query
    return url


def private(url: str) -> str:
    """A public URL with the query that it, or the folder it lies in, was given with."""
    above = url.rstrip("/")
    while above and above not in _queries:
        above = above.rpartition("/")[0]
    return f"{url}?{_queries[above]}" if above else url


def forget(url: str) -> None:
    """Has a public URL be asked for without the query that it was given with before."""
    _queries.pop(url.rstrip("/"), None)


# The Hub -------------------------------------------------------------------------------------------------------------


class Repository(NamedTuple):
    """A path on the Hugging Face Hub: what kind of repository, None for a model; its name, the revision if one is named, a path in it."""

    kind: str | None
    name: str
    revision: str | None
    path: str


def repository(url: str) -> Repository:
    """The one of an ``hf://`` URL.

    Raises:
        UsageError: it is none.
    """
    match = _HUB.fullmatch(url.rstrip("/"))
    if not match:
        raise UsageError(f"{url}: expected hf://organization/name, with @revision and a path in it where wanted")
    return Repository(match["kind"], match["id"], match["revision"] and unquote(match["revision"]), match["path"] or "")


def from_page(url: str) -> str:
    """The ``hf://`` URL of a page of the Hub, as it is copied from a browser; others as they are."""
    if not (page := _PAGE.fullmatch(url)):
        return url
    revision = page["revision"]
    return f"hf://{page['id']}{f'@{revision}' if revision else ''}{unquote(page['path'] or '')}"


def is_offline() -> bool:
    """Whether the Hub is not to be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


# Refusals ------------------------------------------------------------------------------------------------------------


def credentials(scheme: str) -> str:
    """How they are given."""
    return _HOW.get(_SAME.get(scheme, scheme)) or f"set the credentials that fsspec's {scheme} file system looks for"


def refusal(url: str, status: int, reason: str = "") -> UsageError:
    """The error for a file that is not to be had: ``status`` as HTTP has them, 200 where a range was asked for."""
    line, scheme = one_line(url), scheme_of(url)
    reason = reason or f"HTTP {status}"
    if status in (401, 403, 407):
        what = "not without credentials" if status == 401 else "access is denied"
        return UsageError(f"{line}: {what} ({reason}): {credentials(scheme)}")
    if status in (404, 410):
        detail = f" ({reason})" if scheme in WEB else ""
        return UsageError(f"{line}: no such file or directory{detail}: give the URL of a checkpoint's file or its directory")
    if status == 200:
        what = "the server sends whole files only and knows no ranges"
        return UsageError(f"{line}: {what}: download the checkpoint, or put it on a server that does (nginx, an object store)")
    return UsageError(f"{line}: cannot be read ({reason}): check the address")


def unwritable(url: str, reason: object, *, begun: bool, instead: str = "give another DST") -> StreamconvError:
    """The error for an address that does not take what is written, however often; ``begun``: it has taken something before."""
    scheme = scheme_of(url)
    remedy = "set HF_TOKEN to a token that may write it" if scheme == "hf" else f"check its name, or {credentials(scheme)}"
    text = f"{url}: cannot be written ({reason}): {remedy}"
    if begun:
        return RunError(f"{text}, then rerun with --resume")
    error = DestinationError(f"{text}, or {instead}")
    error.nothing_written = True
    return error


def missing(scheme: str, error: ImportError) -> UsageError:
    """The error for a package that is not there; fsspec's own says only ``Install s3fs to access S3``."""
    match = re.search(r"[Ii]nstall '?([\w-]+)", str(error))
    name = (error.name or (match[1] if match else "fsspec")).partition(".")[0]
    more = "" if name in _OURS else f" {name}"
    return UsageError(f"{scheme}:// needs the package {name}: pip install 'streamconv[remote]'{more}")
