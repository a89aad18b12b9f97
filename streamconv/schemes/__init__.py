"""Quantizations: how each is told, and what its numbers are."""
