"""A checkpoint: what a path holds, as a mapping of tensor names to entries, whatever container they lie in."""
