"""Command line: arguments, commands, and progress lines."""
