"""Models merged into one, as a file of mergekit says it: what it says, which tensors of which models, by what arithmetic."""
