"""Adapters: what each application of a recursive block may own beside the shared block.

All of them leave the block's function unchanged until they are trained. With F the shared block,
x the input of application l and x_0 that of the first application:

  lora:R         W <- W + D_l U_l for every linear map x W + b of F, with D_l (in, R) and
                 U_l (R, out) = 0 (Hu et al., "LoRA", 2021; Bae et al., "Relaxed Recursive
                 Transformers", 2024);
  lora:R:A+B     the same for the linear maps named A and B, such as qkv or mlp/fc1;
  norms          scale <- scale + s_l, bias <- bias + b_l for every LayerNorm of F, s_l = b_l = 0;
  biases         p <- p + p_l, p_l = 0, for every other array p of F that is no kernel: biases of
                 linear maps, tables of position biases, residual coefficients;
  embedding      x <- x + e_l at the input of F, e_l = 0 (C,);
  inject:add     x <- x + g_l * x_0 at the input of F, g_l = 0 (C,);
  inject:linear  x <- x + x_0 W_l at the input of F, W_l = 0 (C, C). Input injection is that of
                 Bai et al., "Deep Equilibrium Models", 2019.

With NAME@n, such as embedding@2 or lora:8@3, n successive applications share a row. SReT's NLLs are
rows of the same kind; see `NonLinearLayers`.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sret_jax.errors import did_you_mean
from sret_jax.models.recursion import PerLoop, Recursion, Row, Rows

Path = tuple[str, ...]
Shapes = Mapping[Path, jax.ShapeDtypeStruct | np.ndarray]  # of the shared block's parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter(PerLoop):
    """An adapter; its parameters have a leading axis of ceil(loops / share).

    Attributes:
      share: number of successive applications that share a row.
    """

    name: ClassVar[str]  # of its parameters, beside "block"
    arguments: ClassVar[str] = ""  # what follows its name in a specification

    share: int = 1

    @classmethod
    def of(cls, argument: str, share: int) -> Self:
        """Makes the adapter that is specified as NAME:ARGUMENT@SHARE.

        Raises:
          ValueError: it does not take this argument.
        """
        if argument:
            raise ValueError(f"takes no argument {argument!r}")
        return cls(share=share)

    def count(self, loops: int) -> int:
        """The number of rows for so many applications."""
        return -(-loops // self.share)

    def start(self, key: jax.Array, rows: int, block: Shapes, width: int) -> Rows:
        """The initial rows.

        Args:
          key: random key.
          rows: their number.
          block: shapes of the shared block's parameters.
          width: C, the channels of a token.
        """
        raise NotImplementedError

    def check(self, block: Shapes) -> None:
        """Raises ValueError if the adapter does not fit a block with such parameters."""

    def rows(self, recursion: Recursion, x: jax.Array, train: bool) -> Rows:
        """See `PerLoop`."""
        loops = recursion.loops
        own: Rows
        if recursion.is_initializing():
            block, width = _shapes(recursion, x), x.shape[-1]
            own = recursion.param(
                self.name, lambda key: self.start(key, self.count(loops), block, width)
            )
        else:
            own = recursion.get_variable("params", self.name)
        if self.share == 1:
            return own
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, self.share, 0)[:loops], own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightAdapter(Adapter, abc.ABC):
    """An adapter that changes parameters of F, and so makes another block of it."""

    @abc.abstractmethod
    def nearest(self, differences: Mapping[Path, np.ndarray]) -> Rows:
        """The rows whose changes of F's parameters come nearest to these.

        Args:
          differences: of each parameter, (rows, ...).
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(WeightAdapter):
    """W <- W + D_l U_l: "lora:RANK", or "lora:RANK:MAP+MAP" for some linear maps of F.

    Each application adds D_l U_l to the weights, so layers and kernels know nothing of it. With
    remat="none" or "dots", the backward pass stores the product of each application.

    Attributes:
      rank: R, columns of D_l.
      maps: ends of the paths of linear maps; (): all.
    """

    name: ClassVar[str] = "lora"
    arguments: ClassVar[str] = ":RANK or :RANK:MAP+MAP"

    rank: int
    maps: tuple[str, ...] = ()

    @classmethod
    def of(cls, argument: str, share: int) -> Self:
        """See `Adapter`."""
        rank, _, maps = argument.partition(":")
        if not re.fullmatch(r"[1-9]\d{0,5}", rank):
            raise ValueError("needs a rank of at least 1, as in lora:8")
        return cls(share=share, rank=int(rank), maps=tuple(filter(None, maps.split("+"))))

    def start(self, key: jax.Array, rows: int, block: Shapes, width: int) -> Rows:
        """See `Adapter`: D_l ~ N(0, 1/in), U_l = 0."""
        del width
        found: dict[Path, jax.Array] = {}
        for i, (path, (fan_in, features)) in enumerate(sorted(self.adapted(block).items())):
            drawn = jax.random.normal(jax.random.fold_in(key, i), (rows, fan_in, self.rank))
            found[*path, "down", "kernel"] = drawn / math.sqrt(fan_in)
            found[*path, "up", "kernel"] = jnp.zeros((rows, self.rank, features))
        return unflatten_dict(found)

    def adapted(self, block: Shapes) -> dict[Path, tuple[int, ...]]:
        """The shapes (in, out) of the linear maps that are adapted."""
        return {
            path: shape
            for path, shape in linear_maps(block).items()
            if not self.maps or any(_ends(path, name) for name in self.maps)
        }

    def check(self, block: Shapes) -> None:
        """See `Adapter`."""
        known = linear_maps(block)
        for name in self.maps:
            if not any(_ends(path, name) for path in known):
                paths = ["/".join(path) for path in known]
                raise ValueError(f"has an {did_you_mean('linear map', name, paths)}")
        adapted = self.adapted(block)
        if not adapted:
            raise ValueError("finds no linear map in the block; leave it out")
        for path, shape in adapted.items():
            if self.rank > min(shape):
                raise ValueError(
                    f"has rank {self.rank}, but {'/'.join(path)} has {shape[0]} inputs and "
                    f"{shape[1]} outputs; use at most {min(shape)}"
                )

    def nearest(self, differences: Mapping[Path, np.ndarray]) -> Rows:
        """See `WeightAdapter`: D_l U_l has the largest singular values of the difference of W."""
        found: dict[Path, np.ndarray] = {}
        for path in self.adapted({path: leaf[0] for path, leaf in differences.items()}):
            wanted = differences[*path, "kernel"].astype(np.float64)  # (rows, in, out)
            left, values, right = np.linalg.svd(wanted, full_matrices=False)
            roots = np.sqrt(values[:, None, : self.rank])
            down, up = left[..., : self.rank] * roots, right[:, : self.rank] * roots.mT
            found[*path, "down", "kernel"] = down.astype(np.float32)
            found[*path, "up", "kernel"] = up.astype(np.float32)
        return unflatten_dict(found)

    def weights(self, params: Any, row: Row) -> Any:
        """See `PerLoop`."""
        flat, own = flatten_dict(params), flatten_dict(row)
        for path in {path[:-2] for path in own}:
            down, up = own[*path, "down", "kernel"], own[*path, "up", "kernel"]
            flat[*path, "kernel"] = flat[*path, "kernel"] + down @ up  # (in, out)
        return unflatten_dict(flat)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offsets(WeightAdapter):
    """p <- p + p_l, p_l = 0, for some arrays p of F."""

    def start(self, key: jax.Array, rows: int, block: Shapes, width: int) -> Rows:
        """See `Adapter`."""
        del key, width
        return unflatten_dict(
            {path: jnp.zeros((rows, *block[path].shape)) for path in self.adapted(block)}
        )

    @abc.abstractmethod
    def adapted(self, block: Iterable[Path]) -> set[Path]:
        """The paths of those arrays."""

    def check(self, block: Shapes) -> None:
        """See `Adapter`."""
        if not self.adapted(block):
            raise ValueError("finds nothing in the block that it could change; leave it out")

    def nearest(self, differences: Mapping[Path, np.ndarray]) -> Rows:
        """See `WeightAdapter`: p_l is the difference of p."""
        return unflatten_dict({path: differences[path] for path in self.adapted(differences)})

    def weights(self, params: Any, row: Row) -> Any:
        """See `PerLoop`."""
        flat = flatten_dict(params)
        changed = {path: flat[path] + offset for path, offset in flatten_dict(row).items()}
        return unflatten_dict(flat | changed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norms(Offsets):
    """scale <- scale + s_l, bias <- bias + b_l: a depth code of F's LayerNorms."""

    name: ClassVar[str] = "norms"

    def adapted(self, block: Iterable[Path]) -> set[Path]:
        """See `Offsets`."""
        paths = set(block)
        return {path for path in paths if (*path[:-1], "scale") in paths}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Biases(Offsets):
    """p <- p + p_l for all arrays of F but kernels and those of LayerNorms."""

    name: ClassVar[str] = "biases"

    def adapted(self, block: Iterable[Path]) -> set[Path]:
        """See `Offsets`."""
        paths = set(block)
        return {path for path in paths - Norms().adapted(paths) if path[-1] != "kernel"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding(Adapter):
    """x <- x + e_l: a depth code that is added to every token."""

    name: ClassVar[str] = "embedding"

    def start(self, key: jax.Array, rows: int, block: Shapes, width: int) -> Rows:
        """See `Adapter`."""
        del key, block
        return {"bias": jnp.zeros((rows, width))}

    def enter(self, x: jax.Array, row: Row, first: jax.Array) -> jax.Array:
        """See `PerLoop`."""
        return x + row["bias"].astype(x.dtype)[None, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Injection(Adapter):
    """x <- x + g_l * x_0 ("inject:add") or x <- x + x_0 W_l ("inject:linear").

    Attributes:
      kind: "add" or "linear".
    """

    name: ClassVar[str] = "inject"
    arguments: ClassVar[str] = ":add or :linear"

    kind: str

    @classmethod
    def of(cls, argument: str, share: int) -> Self:
        """See `Adapter`."""
        if argument not in ("add", "linear"):
            raise ValueError("must be inject:add or inject:linear")
        return cls(share=share, kind=argument)

    def start(self, key: jax.Array, rows: int, block: Shapes, width: int) -> Rows:
        """See `Adapter`."""
        del key, block
        if self.kind == "add":
            return {"gain": jnp.zeros((rows, width))}
        return {"kernel": jnp.zeros((rows, width, width))}

    def enter(self, x: jax.Array, row: Row, first: jax.Array) -> jax.Array:
        """See `PerLoop`."""
        if self.kind == "add":
            return x + row["gain"].astype(x.dtype)[None, None] * first
        return x + first @ row["kernel"].astype(x.dtype)


ADAPTERS: dict[str, type[Adapter]] = {
    kind.name: kind for kind in (LowRank, Norms, Biases, Embedding, Injection)
}


def list_adapters() -> list[str]:
    """What the setting `adapters` may contain: ["lora:RANK or :RANK:MAP+MAP", "norms", ...]."""
    return [f"{name}{kind.arguments}" for name, kind in ADAPTERS.items()]


def adapters_of(specifications: tuple[str, ...]) -> tuple[Adapter, ...]:
    """The adapters that are specified; see this module.

    Raises:
      ValueError: one is unknown, has a wrong argument, or is given twice.
    """
    if isinstance(specifications, str) or not all(isinstance(s, str) for s in specifications):
        raise ValueError(
            f"adapters={specifications!r} must be a tuple of names, such as ('lora:8', 'norms')"
        )
    found = tuple(map(_adapter, specifications))
    names = [adapter.name for adapter in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"adapters={specifications} has {name} twice; a block takes one")
    return found


def _adapter(specification: str) -> Adapter:
    rest, at, share = specification.partition("@")
    name, _, argument = rest.partition(":")
    if name not in ADAPTERS:
        raise ValueError(did_you_mean("adapter", name, ADAPTERS))
    if at and not re.fullmatch(r"[1-9]\d{0,8}", share):
        raise ValueError(
            f"the adapter {specification!r} needs a number of loops of at least 1 after @"
        )
    try:
        return ADAPTERS[name].of(argument, int(share or 1))
    except ValueError as e:
        raise ValueError(f"the adapter {specification!r} {e}") from e


def linear_maps(block: Shapes) -> dict[Path, tuple[int, ...]]:
    """The shapes (in, out) of a block's linear maps, by path without "kernel"."""
    return {
        path[:-1]: leaf.shape
        for path, leaf in block.items()
        if path[-1] == "kernel" and len(leaf.shape) == 2
    }


def _ends(path: Path, name: str) -> bool:
    return f"/{'/'.join(path)}".endswith(f"/{name}")


def _shapes(recursion: Recursion, x: jax.Array) -> Shapes:
    """The shapes of the shared block's parameters, which need not exist yet."""
    block: Any = recursion.block.clone(parent=None, name=None)
    turn = {} if recursion.turns[0] is None else {"turn": recursion.turns[0]}
    variables = jax.eval_shape(lambda: block.init(jax.random.key(0), x[:1], **turn))
    shapes: Shapes = flatten_dict(variables["params"])
    return shapes
