"""Freeze the front of a network while the rest trains on.

    from gsm_optax.freezing import freeze_blocks, single_shot

The schedules say how many leading blocks are frozen at a step, `freeze_blocks` holds
them, and `stop_frozen_gradients` takes their backward pass out of the program.
"""

from gsm_optax._freezing import (
    FreezeBlocksState as FreezeBlocksState,
    freeze_blocks as freeze_blocks,
    stop_frozen_gradients as stop_frozen_gradients,
)
from gsm_optax._freezing_schedules import (
    delayed_periodic as delayed_periodic,
    freezing_saving as freezing_saving,
    periodic as periodic,
    single_shot as single_shot,
    single_shot_resume as single_shot_resume,
    single_shot_start as single_shot_start,
)
