"""The commands, a module each, which is loaded when its command is given: ``execute`` carries it out and returns the exit code."""
