"""Draw the four freezing schedules, on a run of 160 epochs and a model of 8 blocks.

python examples/freezing_schedules.py docs/figures/freezing_schedules.png
"""

import argparse

import matplotlib

from gsm_optax.freezing import (
    delayed_periodic,
    periodic,
    single_shot,
    single_shot_resume,
)

matplotlib.use("Agg")

from gsm_optax import plot

EPOCHS, BLOCKS = 160, 8
PERIODS = (8, 8, 4, 4, 2, 2, 1, 1)
SCHEDULES = {
    "single_shot": single_shot(start=80, interval=10, blocks=5),
    "single_shot_resume": single_shot_resume(80, 10, 5, steps=EPOCHS, resume=20),
    "periodic": periodic(PERIODS, interval=4),
    "delayed_periodic": delayed_periodic(80, PERIODS, interval=4),
}


def main():
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", help="the figure, PNG")
    figure = plot.frozen_blocks(SCHEDULES, steps=EPOCHS, blocks=BLOCKS)
    figure.savefig(parser.parse_args().output, dpi=100)


if __name__ == "__main__":
    main()
