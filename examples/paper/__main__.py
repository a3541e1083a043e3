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

from examples.paper import experiment, figures, tables
from examples.paper.recipes import RECIPES


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
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list all recipes")
    run = commands.add_parser("run", help="run recipes")
    run.add_argument("recipes", nargs="+", metavar="RECIPE", choices=[*RECIPES])
    run.add_argument("--seeds", type=positive, default=3, help="as many, from 0 on")
    run.add_argument("--data", dest="folder", help="of idx files or prepared tfds data")
    run.add_argument("--validate", action="store_true", help="spare the test set")
    table = commands.add_parser("table", help="print results as Markdown")
    figure = commands.add_parser("figure", help="draw densities")
    curve = commands.add_parser("curve", help="draw accuracies")
    for command in (run, table, figure, curve):
        command.add_argument("--results", type=Path, default="results/paper")
    for command, file in {figure: "densities.png", curve: "compression.png"}.items():
        command.add_argument("--output", type=Path, default=f"results/{file}")
    return parser.parse_args(argv)


def run(recipes: list[str], seeds: int, results: Path, **options) -> None:
    """Run recipes for all seeds, and print the accuracies of each."""
    for seed in range(seeds):
        for name in recipes:
            try:
                record = experiment.run(RECIPES[name], seed, results, **options)
            except (OSError, ImportError, ValueError, FloatingPointError) as error:
                raise SystemExit(f"error: {error}") from None
            scores = (f"{key} {value:.2f}" for key, value in record["accuracy"].items())
            print(f"{name}, seed {seed}: {', '.join(scores)}", flush=True)


def main(argv=None) -> None:
    """Do what the command line says."""
    args = vars(parse_args(argv))
    match args.pop("command"):
        case "list":
            print(tables.recipes_table())
        case "table":
            print(tables.results_table(**args))
        case "run":
            run(**args)
        case "figure":
            figures.densities(**args)
        case "curve":
            figures.compression(**args)


if __name__ == "__main__":
    main()
