"""64-300-100-10 for scikit-learn's digits of 8x8 pixels; 50,200 kernel entries."""

from functools import partial

from examples.paper.models.lenet_300_100 import LeNet300

MLP = partial(LeNet300, inputs=64)
