"""The command line: arguments, verbs, and the lines that tell of progress."""
