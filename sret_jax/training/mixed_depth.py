"""Mixed-depth training: a shallow and the deep path of one model, trained together.

The SReT paper speaks of mixed-depth training, and there is no code for it. We read it so: the deep
path is the model, the shallow path the same model with fewer loops, whose weights are the deep
one's by `with_loops` (the shared blocks, and of every block the first NLLs), and

    loss = L(deep path) + weight * L(shallow path),

with L the loss of the run on the same images and labels. BatchNorm is in the stem alone, before
any loop, so both paths have the same batch statistics; the deep path's are kept. Each path drops
paths and permutes tokens by keys of its own.
"""

import dataclasses

from sret_jax.errors import UserError
from sret_jax.models.families.sret import SReT, check_model


@dataclasses.dataclass(frozen=True)
class MixedDepth:
    """The section config.mixed_depth.

    Attributes:
      loops: of the shallow path; 0: there is none.
      weight: of its loss.
    """

    loops: int = 0
    weight: float = 1.0

    def check(self, model: SReT) -> None:
        """Raises UserError for loops or a weight that make no second path of this model."""
        if not isinstance(self.loops, int) or not 0 <= self.loops < model.loops:
            raise UserError(
                f"config.mixed_depth.loops={self.loops} must be a whole number below the "
                f"{model.loops} loops of the model, or 0 for no shallow path"
            )
        if not self.weight > 0:
            raise UserError(
                f"config.mixed_depth.weight={self.weight} must be above 0; set "
                "config.mixed_depth.loops=0 for no shallow path"
            )
        if self.loops:
            try:
                check_model(model.clone(loops=self.loops))
            except ValueError as e:
                raise UserError(f"config.mixed_depth: {e}") from e


DEEP_ONLY = MixedDepth()
