"""A transformed model must compute what the model computed: checked on its logits before anything is quantized."""

from torch import Tensor

from bisup_lightning.errors import UserError
from bisup_lightning.model.blockwise import BlockwiseModel

TOLERANCE = 1e-4  # relative, in float32: rounding of a few hundred products in a row stays ten times below


def relative_logit_error(plain: BlockwiseModel, transformed: BlockwiseModel, ids_BT: Tensor) -> float:
    """‖logits − transformed logits‖ / ‖logits‖ on token ids [B, T]; both models block by block."""
    logits_BTV, transformed_BTV = (model.logits(ids_BT).double() for model in (plain, transformed))
    return ((logits_BTV - transformed_BTV).norm() / logits_BTV.norm()).item()


def check_invariance(plain: BlockwiseModel, transformed: BlockwiseModel, ids_BT: Tensor) -> float:
    """The relative error of the transformed model's logits.

    Args:
        plain: The model as it is, computing in float32.
        transformed: The same behind the transform, likewise.
        ids_BT: Token ids [B, T]; a few dozen suffice.

    Raises:
        UserError: If the error exceeds `TOLERANCE`.
    """
    error = relative_logit_error(plain, transformed, ids_BT)
    if not error <= TOLERANCE:
        raise UserError(
            f"transform: full-precision logits change by {error:.1e} (relative), more than {TOLERANCE:.0e}; "
            "this model can't be transformed so: choose another transform"
        )
    return error
