"""Settings of the whole suite."""

from __future__ import annotations

import os

from hypothesis import settings

# Where a change is judged, the same examples are tried each time; at a desk, new ones.
settings.register_profile("judged", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("judged")
