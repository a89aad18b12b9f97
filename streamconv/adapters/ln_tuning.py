"""LN tuning: norms that were trained as they are."""

from __future__ import annotations

from streamconv.adapters.kind import Kind

KIND = Kind("LN_TUNING", has_scale=False)
"""All of its tensors are whole ones; see `keys`."""
