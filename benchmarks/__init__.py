"""
Speed and memory beside what a user would pick instead: `python -m benchmarks --help`.

Each command is a module with `add_arguments(parser)` and `run(arguments)`, which writes the results.
"""
