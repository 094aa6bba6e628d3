"""Command-line tools; each has `--help` with an example."""
