"""What each application of a recursive block has of its own: keys, permutations, NLLs, probes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sret_jax.models.layers.attention import PERMUTATIONS, PermutationFn, Slices
from sret_jax.models.layers.residual import ResidualMLP
from sret_jax.models.recursion import PerLoop, Recursion, Row, Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropPathKeys(PerLoop):
    """Gives F a random key of each application in training: `drop_path`."""

    def rows(self, recursion: Recursion, x: jax.Array, train: bool) -> Rows:
        """See `PerLoop`; the keys come from the rng stream "drop_path"."""
        return recursion.keys("drop_path") if train else None

    def given(self, row: Row, x: jax.Array, turn: Any) -> dict[str, Any]:
        """See `PerLoop`."""
        return {"drop_path": row}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Permutations(PerLoop):
    """Gives F the permutation of the tokens in each application that slices permuted tokens.

    Attributes:
      chosen: a name in `PERMUTATIONS`, or a function (key, n) -> indices.
      prefix: number of tokens, before those of the image, that are not permuted.
    """

    chosen: str | PermutationFn
    prefix: int = 0

    def rows(self, recursion: Recursion, x: jax.Array, train: bool) -> Rows:
        """See `PerLoop`; the keys come from the rng stream "permutation".

        Raises:
          ValueError: the rng stream is missing, without which all permutations would be equal.
        """
        turns: Any = recursion.turns[: recursion.loops]
        if not any(turn.permuted for turn in turns):
            return None
        if recursion.has_rng("permutation"):
            return recursion.keys("permutation")
        if (self.chosen == "random" or callable(self.chosen)) and not recursion.is_initializing():
            what = "random" if self.chosen == "random" else "a function of a key"
            raise ValueError(
                f"the permutations are {what}, but no rng stream 'permutation' was given, without "
                "which all of them would be equal; pass rngs={'permutation': key} to apply"
            )
        return jax.random.split(jax.random.key(0), recursion.loops)  # which no draw uses

    def given(self, row: Row, x: jax.Array, turn: Slices) -> dict[str, Any]:
        """See `PerLoop`."""
        if not turn.permuted:
            return {}
        draw = PERMUTATIONS[self.chosen] if isinstance(self.chosen, str) else self.chosen
        return {"permutation": draw(row, x.shape[1] - self.prefix)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientProbe(PerLoop):
    """Measures the gradient at the output of each application, where the caller asks for it.

    If the collection "probes" has a variable "gradient_norm" (loops,), its gradient with respect
    to the loss is the norm of the loss's gradient at the output of each application, after
    everything that comes before this in `Recursion.per_loop`.
    """

    def rows(self, recursion: Recursion, x: jax.Array, train: bool) -> Rows:
        """See `PerLoop`."""
        return recursion.get_variable("probes", "gradient_norm")

    def leave(self, x: jax.Array, row: Row) -> jax.Array:
        """See `PerLoop`."""
        return probe_gradient(x, row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonLinearLayers(PerLoop):
    """SReT's NLLs: a layer with its own weights after every n-th application.

    Attributes:
      layer: the layer without parameters, which are stacked under "nll"; made with parent=None.
    """

    layer: ResidualMLP

    def rows(self, recursion: Recursion, x: jax.Array, train: bool) -> Rows:
        """See `PerLoop`."""
        count, token = recursion.loops // self.every, jnp.zeros((1, 1, x.shape[-1]))
        k = jnp.ones(1)

        def init(key: jax.Array) -> Rows:
            keys = jax.random.split(key, count)
            return jax.vmap(lambda key: self.layer.init(key, token, k)["params"])(keys)

        return recursion.param("nll", init)

    def leave(self, x: jax.Array, row: Row) -> jax.Array:
        """See `PerLoop`."""
        out: Any = self.layer.apply({"params": row}, x, jnp.ones(x.shape[0]))
        return out


@jax.custom_vjp
def probe_gradient(x: jax.Array, probe: jax.Array) -> jax.Array:
    """Returns x; the gradient of the scalar `probe` is the norm of x's gradient."""
    del probe
    return x


def _probe_forward(x: jax.Array, probe: jax.Array) -> tuple[jax.Array, None]:
    del probe
    return x, None


def _probe_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, jnp.linalg.norm(gradient.astype(jnp.float32).ravel())


probe_gradient.defvjp(_probe_forward, _probe_backward)
