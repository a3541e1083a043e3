"""Whole units of a network, which its hardware can drop: channels, neurons, heads.

    from gsm_optax.units import find_units, shrink

`find_units` finds them in any JAX function, `shrink` removes those that add nothing.
"""

from gsm_optax.units._families import (
    Family as Family,
    Pinned as Pinned,
    Slices as Slices,
)
from gsm_optax.units._find import find_units as find_units
from gsm_optax.units._plan import FamilyPlan as FamilyPlan, Plan as Plan
from gsm_optax.units._shrink import shrink as shrink
from gsm_optax.units._units import Units as Units
