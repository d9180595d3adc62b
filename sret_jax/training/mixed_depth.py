"""Mixed-depth training: a shallow and a deep path of one model, trained together.

Shen et al. (ECCV 2022) mention mixed-depth training but publish no code. This is our reading. The
deep path is the model. The shallow path is the same model with fewer loops; `with_loops` takes its
weights from the deep path (the shared blocks, and the first NLLs of every block). The loss is

    loss = L(deep path) + weight * L(shallow path),

where L is the loss of the run, on the same images and labels. Both paths have the same batch
statistics, if the model has BatchNorm, because no recursive block has one; those of the deep path
are kept. Drop path and permutations are drawn independently for each path.
"""

import dataclasses

from sret_jax.errors import UserError
from sret_jax.models.checks import check
from sret_jax.models.model import Model


@dataclasses.dataclass(frozen=True)
class MixedDepth:
    """The section config.mixed_depth.

    Attributes:
      loops: loops of the shallow path; 0: there is no shallow path.
      weight: weight of the shallow path's loss.
    """

    loops: int = 0
    weight: float = 1.0

    def check(self, model: Model) -> None:
        """Raises UserError if loops and weight define no shallow path of this model."""
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
                check(model.clone(loops=self.loops))
            except ValueError as e:
                raise UserError(f"config.mixed_depth: {e}") from e


DEEP_ONLY = MixedDepth()
