"""From a path and options to a plan, and the calls that do so."""
