"""A walk through a program, equation by equation, that follows its axes."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsm_optax.units._axes import Axis, Ties, Value, same_number, slab_values
from gsm_optax.units._rules import apply_rule

# Parameters of primitives that follow from the shapes of the results.
_SHAPES = {
    *("shape", "new_sizes", "sizes", "slice_sizes", "feature_group_count"),
    *("start_indices", "limit_indices", "sharding", "out_sharding"),
}


class Step(NamedTuple):
    """An equation as the walk met it, to be compared with that of a smaller network."""

    what: Any  # primitive, operands by number, parameters: the same in both
    outs: list[np.ndarray]  # nodes along each axis of the results
    starts: list[tuple[np.ndarray, int]]  # of a slice: nodes before it
    const: Any = None


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
        self.products: list[tuple[str, np.ndarray]] = []  # of a product of two activations
        self.steps: list[Step] = []
        self.seen: dict[bytes, np.ndarray] = {}  # nodes along each different axis
        self._place: tuple[int, ...] = ()

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

    def contract(self, eqn: Any, one: Axis, other: Axis) -> None:
        """Sum over two axes: an index adds nothing where either is zero."""
        self.tie(one, other)
        silent = (one["value"] == 0) | (other["value"] == 0)
        self.add(eqn, one, ~silent)

    def add(self, eqn: Any, axis: Axis, there: np.ndarray) -> None:
        """Note that these indices of an axis add something."""
        self.sums.append((eqn.primitive.name, axis["id"][there]))

    def choose(self, eqn: Any, group: int, axes: list[Axis]) -> int | None:
        """Which of the axes is followed through a reshape; None if that is open.

        The others are pinned, so a single one that can still lose an index is taken.
        """
        key = (*self._place, group)
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
        place, self._place = self._place, (*self._place, branch)
        consts = [self.constant(const) for const in getattr(program, "consts", ())]
        outs = self.run(getattr(program, "jaxpr", program), consts, args)
        self._place = place
        return outs

    # The walk itself

    def constant(self, array: Any) -> Value:
        """A constant: an axis along which it is not the same everywhere is pinned."""
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
        ids = [axis["id"] for axis in axes]
        self.steps.append(Step("constant", ids, [], array))
        number = float(same_number(list(values[0]))) if array.size else np.nan
        return Value(axes, number, is_weight=True)

    def run(self, jaxpr: Any, consts: list[Value], args: list[Value]) -> list[Value]:
        """The results of a program, from its operands."""
        inputs = [*jaxpr.constvars, *jaxpr.invars]
        known = dict(zip(inputs, [*consts, *args], strict=True))
        numbers = {var: i for i, var in enumerate(inputs)}

        def read(atom: Any) -> Value:
            return self.constant(atom.val) if hasattr(atom, "val") else known[atom]

        place = self._place
        for i, eqn in enumerate(jaxpr.eqns):
            self._place = (*place, i)
            operands = [read(atom) for atom in eqn.invars]
            outs = apply_rule(self, eqn, operands)
            self._note(eqn, numbers, operands, outs)
            for var, value in zip(eqn.outvars, outs, strict=True):
                known[var] = value
                numbers[var] = len(numbers)
        self._place = place
        return [read(atom) for atom in jaxpr.outvars]

    def see(self, value: Value) -> None:
        """Remember the axes of an array; one of size 1 cannot lose its index."""
        for axis in value.axes:
            ids = np.ascontiguousarray(axis["id"])
            self.seen.setdefault(ids.tobytes(), ids)
            if len(ids) == 1:
                self.ties.pin(ids, "size 1")

    def _note(self, eqn: Any, numbers: Any, args: Any, outs: list[Value]) -> None:
        for value in outs:
            self.see(value)
        operands = tuple(
            _bits(atom.val) if hasattr(atom, "val") else numbers[atom]
            for atom in eqn.invars
        )
        what = (eqn.primitive.name, operands, _plain_params(eqn.params))
        nodes = [axis["id"] for value in outs for axis in value.axes]
        starts = [
            (axis["id"], start)
            for axis, start in zip(
                args[0].axes if args else (), eqn.params.get("start_indices", ())
            )
        ]
        self.steps.append(Step(what, nodes, starts))


def _bits(literal: Any) -> Any:
    """A literal, to be compared exactly; arrays are compared as constants are."""
    return None if np.ndim(literal) else np.asarray(literal).tobytes()


def _plain_params(params: dict[str, Any]) -> str:
    """Parameters without shapes, and without programs and functions."""
    plain = {
        name: value
        for name, value in params.items()
        if name not in _SHAPES and not _holds_program(value)
    }
    return re.sub(" at 0x[0-9a-f]+", "", repr(plain))


def _holds_program(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_holds_program, value))
    return callable(value) or hasattr(value, "eqns") or hasattr(value, "jaxpr")
