"""What `maskgen.tools.bench` measures: one module per benchmark, with `main(argv)` that yields results."""
