"""A walk through a program, equation by equation, that follows its axes."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsm_optax.units._axes import Axis, Ties, Value, same_number, slab_values
from gsm_optax.units._contract import Fold
from gsm_optax.units._rules import apply_rule


class Walk:
    """Ties what the equations tie, and notes what a contraction adds up.

    Args:
        choices: for reshapes that have been decided, which of the axes that are
            written one after the other is followed, by the place of the equation.
    """

    def __init__(self, choices: dict[Any, int]) -> None:
        self.ties = Ties()
        self.choices = choices
        self.open: dict[Any, list[np.ndarray]] = {}  # reshapes to be decided
        self.sums: list[tuple[str, np.ndarray]] = []  # nodes that add something
        self.products: list[tuple[str, np.ndarray]] = []  # of two activations
        self.varying: list[np.ndarray] = []  # those that add more than a constant
        self.read: list[np.ndarray] = []  # nodes that are summed over, zeros included
        self.folds: list[Fold] = []  # sums with constants that a bias could add
        self.leaf_nodes = 0  # the first ones are those of the leaves
        self.users: dict[int, set[Any]] = {}  # places where each leaf is used
        self.uses: Counter[Any] = Counter()  # of variables, in the present program
        self.seen: dict[bytes, np.ndarray] = {}  # nodes along each different axis
        self.nodes: dict[Any, Any] = {}  # those of the arrays at each place
        self.place: tuple[Any, ...] = ()

    # What rules use

    def new(self, size: int, value: Any = np.nan) -> Axis:
        """An axis tied to nothing."""
        return self.ties.new(size, value)

    def new_axes(self, shape: Any) -> tuple[Axis, ...]:
        """Axes tied to nothing."""
        return tuple(self.new(size) for size in shape)

    def new_pinned(self, eqn: Any, size: int) -> Axis:
        """An axis that the equation pins."""
        axis = self.new(size)
        self.pin(eqn, axis)
        return axis

    def pin(self, eqn: Any, *axes: Axis) -> None:
        """Let the equation pin axes."""
        for axis in axes:
            self.ties.pin(axis["id"], eqn.primitive.name)

    def pin_all(self, eqn: Any, args: list[Value]) -> list[Value]:
        """Let the equation pin all axes of its operands and results."""
        outs = [Value(self.new_axes(var.aval.shape)) for var in eqn.outvars]
        for value in (*args, *outs):
            self.pin(eqn, *value.axes)
        return outs

    def tie(self, one: Axis, other: Axis) -> None:
        """Let two axes of equal length be one."""
        self.ties.tie(one["id"], other["id"])

    def join(self, axes: Any) -> Axis:
        """Tie axes, and keep of their values what they have in common."""
        axes = list(axes)
        for other in axes[1:]:
            self.tie(axes[0], other)
        joined = axes[0].copy()
        joined["value"] = same_number([axis["value"] for axis in axes])
        return joined

    def consume(self, args: list[Value]) -> None:
        """Note that the entries of leaves are used here."""
        for arg in args:
            if arg.leaf >= 0:
                self.users.setdefault(arg.leaf, set()).add(self.place)

    def add(self, eqn: Any, axis: Axis, there: np.ndarray) -> None:
        """Note that these indices of an axis add something."""
        self.sums.append((eqn.primitive.name, axis["id"][there]))

    def is_of_leaf(self, axis: Axis) -> bool:
        """Whether an axis is that of a leaf, index by index; if it is a moved one."""
        return bool((axis["id"] < self.leaf_nodes).all())

    def is_leaf(self, value: Value) -> bool:
        """Whether an array has the entries of a leaf, each once."""
        longer = [axis for axis in value.axes if len(axis) > 1]
        return value.leaf >= 0 and all(map(self.is_of_leaf, longer))

    def choose(self, eqn: Any, group: int, axes: list[Axis]) -> int | None:
        """Which of the axes is followed through a reshape; None if that is open.

        The others are pinned, so a single one that can still lose an index is taken.
        """
        key = (*self.place, group)
        if key in self.choices:
            return self.choices[key]
        live = self.live([axis["id"] for axis in axes])
        if len(live) < 2:
            return live[0] if live else 0
        self.open[key] = [axis["id"] for axis in axes]
        return None

    def live(self, axes: list[np.ndarray]) -> list[int]:
        """Which of the axes have an index that is not pinned."""
        return [i for i, ids in enumerate(axes) if not self.ties.pinned(ids).all()]

    def enter(
        self, eqn: Any, program: Any, args: list[Value], branch: int = 0
    ) -> list[Value]:
        """The results of a program inside of the equation."""
        place, self.place = self.place, (*self.place, branch)
        outs = self.run(program, args)
        self.place = place
        return outs

    # The walk itself

    def constant(self, array: Any, *name: Any) -> Value:
        """A constant: an axis along which it is not the same everywhere is pinned.

        Its name tells it from others at this place.
        """
        if jnp.issubdtype(jnp.result_type(array), jax.dtypes.extended):
            axes = self.new_axes(array.shape)
            for axis in axes:
                self.ties.pin(axis["id"], "constant")
            return Value(axes, is_weight=True)
        array = np.asarray(array)
        if not array.ndim:
            number = array.astype(np.float64) if np.isrealobj(array) else np.nan
            return Value((), float(number), is_weight=True)
        values = slab_values(array)
        axes = tuple(map(self.new, array.shape, values))
        for i, axis in enumerate(axes):
            if array.size and (array != array.take([0], i)).any():
                self.ties.pin(axis["id"], "constant")
        self.nodes[*self.place, *name] = [_ids(axes)]
        number = float(same_number(list(values[0]))) if array.size else np.nan
        return Value(axes, number, is_weight=True)

    def run(self, program: Any, args: list[Value]) -> list[Value]:
        """The results of a program, from its operands; closed over constants or not."""
        consts = [
            self.constant(const, "constant", i)
            for i, const in enumerate(getattr(program, "consts", ()))
        ]
        jaxpr = getattr(program, "jaxpr", program)
        atoms = [atom for eqn in jaxpr.eqns for atom in eqn.invars]
        variables = [a for a in (*atoms, *jaxpr.outvars) if not hasattr(a, "val")]
        outside, self.uses = self.uses, Counter(variables)
        inputs = [*jaxpr.constvars, *jaxpr.invars]
        known = dict(zip(inputs, [*consts, *args], strict=True))

        def read(i: int, atom: Any) -> Value:
            is_literal = hasattr(atom, "val")
            return self.constant(atom.val, "operand", i) if is_literal else known[atom]

        place = self.place
        for i, eqn in enumerate(jaxpr.eqns):
            self.place = (*place, i)
            operands = [read(j, atom) for j, atom in enumerate(eqn.invars)]
            outs = apply_rule(self, eqn, operands)
            for value in outs:
                self.see(value)
            self.nodes[self.place] = [_ids(value.axes) for value in outs]
            if eqn.primitive.name == "slice":
                self.nodes[*self.place, "cut"] = _ids(operands[0].axes)
            known.update(zip(eqn.outvars, outs, strict=True))
        self.place, self.uses = place, outside
        return [read(i, atom) for i, atom in enumerate(jaxpr.outvars)]

    def finish(self, outs: list[Value]) -> None:
        """End the walk: constants that no bias can take on add something.

        A bias must be the sum's own: what else uses it would get the constant, too.
        """
        self.consume(outs)
        is_own = lambda fold: fold.bias >= 0 and len(self.users[fold.bias]) == 1
        for fold in self.folds:
            if not is_own(fold):
                self.sums.append((fold.name, fold.constant))
        self.folds = list(filter(is_own, self.folds))

    def see(self, value: Value) -> None:
        """Remember the axes of an array; one of size 1 cannot lose its index."""
        for axis in value.axes:
            ids = np.ascontiguousarray(axis["id"])
            self.seen.setdefault(ids.tobytes(), ids)
            if len(ids) == 1:
                self.ties.pin(ids, "size 1")


def _ids(axes: tuple[Axis, ...]) -> list[np.ndarray]:
    return [axis["id"] for axis in axes]
