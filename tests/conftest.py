"""Settings of the whole suite."""

from __future__ import annotations

import os
import warnings

import pytest
from checkpoint_files import ROOMY
from hypothesis import HealthCheck, settings

from streamconv.conversion.options import ConvertOptions, Options, PlanOptions, VerifyOptions

pytest_plugins = ("fake_libraries", "processes", "ranked_models", "seeded_defects", "small_source", "toy_model")
"""Modules of tests/fixtures with fixtures of pytest."""

# Where a change is judged, the same examples are tried each time; at a desk, new ones.
# How long one takes tells of the machine only.
settings.register_profile("desk", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("judged", settings.get_profile("desk"), derandomize=True)
settings.load_profile("judged" if os.environ.get("CI") else "desk")

# The budget is the whole process's, and one that has run thousands of tests is larger than one that converts.
for kind in (ConvertOptions, PlanOptions, VerifyOptions):
    assert kind.__init__.__kwdefaults__["max_memory"]
    kind.__init__.__kwdefaults__["max_memory"] = ROOMY
Options.__dataclass_fields__["max_memory"].default = ROOMY  # of the command


@pytest.hookimpl(tryfirst=True)  # before the slow ones are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked sampled(n), all but every nth case are slow. An odd n, or a parameter of two values has one."""
    seen: dict[str, int] = {}
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is None:
            continue
        test = item.nodeid.partition("[")[0]
        if seen.setdefault(test, 0) % mark.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1


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
