"""Reproduce the tables of the GSM paper, on the data that is at hand.

    python -m examples.paper list                      # all recipes
    python -m examples.paper run digits-60x            # three seeds; a minute
    python -m examples.paper table                     # what has been run so far
    python -m examples.paper figure                    # densities found by layer
    python -m examples.paper curve                     # accuracy against compression

Runs go on where they were cut off. Nothing is downloaded.
"""

import argparse
from pathlib import Path

from examples.paper import curve, experiment, figure, records, tables
from examples.paper.recipes import RECIPES

ERRORS = (FileNotFoundError, ImportError, ValueError, FloatingPointError)  # explained


def positive(text: str) -> int:
    """Read a positive number of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    results = argparse.ArgumentParser(add_help=False)
    results.add_argument("--results", type=Path, default="results/paper", help="folder")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list all recipes")
    add = commands.add_parser("run", parents=[results], help="run recipes").add_argument
    add("recipes", nargs="+", metavar="RECIPE", choices=[*RECIPES])
    add("--seeds", type=positive, default=3, help="number of seeds, from 0 on")
    add("--data", help="folder of idx files or prepared tfds data")
    add("--bfloat16", action="store_true", help="compute in bfloat16")
    add("--validate", action="store_true", help="test on a sixth of the training set")
    commands.add_parser("table", parents=[results], help="print results as Markdown")
    draw = commands.add_parser("figure", parents=[results], help="draw densities")
    draw.add_argument("--output", type=Path, default=Path("results/densities.png"))
    draw = commands.add_parser("curve", parents=[results], help="draw accuracies")
    draw.add_argument("--output", type=Path, default=Path("results/compression.png"))
    return parser.parse_args(argv)


def run(args) -> None:
    """Run recipes for all seeds, and print the accuracies of each."""
    kind = {"validate": args.validate, "bfloat16": args.bfloat16}
    for seed in range(args.seeds):
        for name in args.recipes:
            try:
                record = experiment.run(
                    RECIPES[name], seed, args.results, args.data, **kind
                )
            except ERRORS as error:
                raise SystemExit(f"error: {error}") from None
            scores = (f"{key} {value:.2f}" for key, value in record["accuracy"].items())
            path = records.path_of(args.results, name, seed, **kind)
            print(f"{name}, seed {seed}: {', '.join(scores)} ({path})", flush=True)


def main(argv=None) -> None:
    """Do what the command line says."""
    args = parse_args(argv)
    if args.command == "list":
        print(tables.recipes_table())
    elif args.command == "run":
        run(args)
    elif args.command == "table":
        print(tables.results_table(args.results))
    else:
        {"figure": figure, "curve": curve}[args.command].draw(args.results, args.output)


if __name__ == "__main__":
    main()
