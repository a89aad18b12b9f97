"""Settings of the whole suite."""

from __future__ import annotations

import os
import warnings

import pytest
from hypothesis import settings

# Where a change is judged, the same examples are tried each time; at a desk, new ones.
settings.register_profile("judged", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("judged")


@pytest.fixture(scope="module")
def transformers():
    """The transformers library, quiet; skips where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("transformers")
        library.utils.logging.set_verbosity_error()
        if hasattr(library.utils.logging, "disable_progress_bar"):
            library.utils.logging.disable_progress_bar()
        return library
