"""How settled a layer is: its activations, and the places of its largest weights.

from gsm_optax.similarity import linear_cka, structural_similarity
"""

from gsm_optax._similarity import (
    LinearCKA as LinearCKA,
    linear_cka as linear_cka,
    mask_overlap as mask_overlap,
    structural_similarity as structural_similarity,
)
