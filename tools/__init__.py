"""Tools for developers: they make checkpoints to try things on, and measure what a command takes. Not part of the installed package."""
