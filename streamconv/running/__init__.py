"""Runs of a plan: whole, in parts, on other machines, resumed; and the state of an output."""
