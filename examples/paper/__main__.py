"""Reproduce the tables of the GSM paper, on the data that is at hand.

    python -m examples.paper list                      # all recipes
    python -m examples.paper run digits-60x            # three seeds; a minute
    python -m examples.paper table                     # what has been run so far
    python -m examples.paper figure                    # densities found by layer
    python -m examples.paper bench                     # time and memory of a step

Runs go on where they were cut off. Nothing is downloaded.
"""

import argparse
from pathlib import Path

from examples.paper import bench, figure, tables
from examples.paper.experiment import Experiment, Options
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
    results.add_argument(
        "--results", type=Path, default=Path("results/paper"), help="folder"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list all recipes")
    run = commands.add_parser("run", parents=[results], help="run recipes")
    run.add_argument("recipes", nargs="+", metavar="RECIPE", choices=[*RECIPES])
    run.add_argument(
        "--seeds", type=positive, default=3, help="number of seeds, from 0 on"
    )
    run.add_argument("--data", help="folder of idx files or prepared tfds data")
    run.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")
    run.add_argument(
        "--validate",
        action="store_true",
        help="test on the last sixth of the training set, which is not trained on",
    )
    commands.add_parser("table", parents=[results], help="print results as Markdown")
    draw = commands.add_parser("figure", parents=[results], help="draw densities")
    draw.add_argument("--output", type=Path, default=Path("results/densities.png"))
    timing = commands.add_parser("bench", help="time and memory of a training step")
    timing.add_argument(
        "--models", nargs="+", choices=[*bench.SHAPES], default=[*bench.SHAPES]
    )
    timing.add_argument(
        "--batch", type=positive, help="by default 64, and 256 for ResNet-50"
    )
    timing.add_argument(
        "--steps", type=positive, default=5, help="steps that are timed"
    )
    timing.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")
    return parser.parse_args(argv)


def run(args) -> None:
    """Run recipes for all seeds, and print the accuracies of each."""
    options = Options(args.results, args.data, args.validate, args.bfloat16)
    for seed in range(args.seeds):
        for name in args.recipes:
            try:
                experiment = Experiment(RECIPES[name], seed, options)
                accuracy = experiment.run()["accuracy"]
            except ERRORS as error:
                raise SystemExit(f"error: {error}") from None
            scores = ", ".join(f"{key} {value:.2f}" for key, value in accuracy.items())
            print(f"{name}, seed {seed}: {scores} ({experiment.path})", flush=True)


def main(argv=None) -> None:
    """Do what the command line says."""
    args = parse_args(argv)
    if args.command == "list":
        print(tables.recipes_table())
    elif args.command == "run":
        run(args)
    elif args.command == "table":
        print(tables.results_table(args.results))
    elif args.command == "figure":
        figure.draw(args.results, args.output)
    else:
        bench.main(args)


if __name__ == "__main__":
    main()
