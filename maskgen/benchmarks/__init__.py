"""What `maskgen.tools.bench` measures: one module per benchmark, whose `main(argv)` yields results."""
