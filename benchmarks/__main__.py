"""`python -m benchmarks COMMAND`: see `python -m benchmarks --help`."""

import argparse
from importlib import import_module

from transformers.utils import logging

ON_MODELS = "decode start prefill greedy drafts serve continuous memory scaling training profile"
ON_SERVERS = "engine load endpoints"
NAMES = [*ON_MODELS.split(), *ON_SERVERS.split(), "gpu", "readme"]
COMMANDS = {name: import_module(f".{name}", __package__) for name in NAMES}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measured beside the alternatives.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.__doc__.strip().splitlines()[0])
        command.add_argument("--layers", type=int, help="measure on a random Llama with this many layers, not SmolLM2")
        command.add_argument("--hidden", type=int, default=1024, help="hidden size of the random Llama")
        command.add_argument("--output", default="benchmarks/results", help="folder of JSON and PNG")
        module.add_arguments(command)

    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # PEFT's and X-LoRA's own advice
    COMMANDS[arguments.command].run(arguments)


if __name__ == "__main__":
    main()
