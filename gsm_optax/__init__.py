"""Global Sparse Momentum SGD: prune JAX networks while they train."""

from gsm_optax._gsm import gsm as gsm, gsm_sgd as gsm_sgd
from gsm_optax._importance import (
    gradient_importance as gradient_importance,
    magnitude_importance as magnitude_importance,
    taylor_importance as taylor_importance,
    tempered_importance as tempered_importance,
)
from gsm_optax._masking import (
    MaskByImportanceState as MaskByImportanceState,
    mask_by_importance as mask_by_importance,
)
from gsm_optax._metrics import metrics as metrics
from gsm_optax._planning import (
    DecayBudget as DecayBudget,
    decay_budget as decay_budget,
    decay_budget_left as decay_budget_left,
)
from gsm_optax._prunable import kernels as kernels
from gsm_optax._pruning import (
    FreezePrunedState as FreezePrunedState,
    apply_mask as apply_mask,
    freeze_pruned as freeze_pruned,
    magnitude_mask as magnitude_mask,
    prune as prune,
)
from gsm_optax._ramp import ratio_ramp as ratio_ramp
from gsm_optax._recording import Recorder as Recorder
from gsm_optax._rounding import (
    StochasticRoundingState as StochasticRoundingState,
    stochastic_rounding as stochastic_rounding,
)
from gsm_optax.report import (
    SparsityReport as SparsityReport,
    sparsity_report as sparsity_report,
)

__version__ = "0.1.0"
