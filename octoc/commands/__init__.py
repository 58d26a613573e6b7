"""One file per command of the command line. Each parses, calls and prints; heavy imports stand inside functions."""
