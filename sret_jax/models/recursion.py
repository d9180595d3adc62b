"""Recursion: one block applied many times with the same weights (SReT section 3.2).

With F the shared block and L loops, for l = 0 .. L-1,

    x <- enter_l(x, x_0);  x <- F(x; weights_l, turn_l, given_l);  x <- leave_l(x),

where x_0 is the input of the first application, weights_l are the shared parameters as application
l sees them, and turn_l = turns[l mod len(turns)] is what differs statically from one application to
the next, such as the number of attention slices. What each application has of its own, such as
random keys, adapters and a non-linear layer (NLL), is given by the `PerLoop`s.

The parameters of F are broadcast to every step of an `nn.scan`. The rows of the `PerLoop`s are
stacked along a leading axis, which the scan runs over. So the traced program contains one cycle of
applications whatever L is: tracing and compiling take time in proportion to the length of the
cycle. (Running time grows with L, of course.)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sret_jax.models.remat import joined, remat, scan_cycles, segment_length

REMAT = ("none", "dots", "block", "full")

Row = Any  # what one application has of its own: a tree of arrays
Rows = Any  # the rows of all applications: the same tree with a leading axis
# What is recorded of an application: a function of its input and its output.
Observer = Callable[[jax.Array, jax.Array], Any]
Carry = Any  # a tree of arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerLoop:
    """What every n-th application of a block has of its own.

    Attributes:
      every: n. Applications n - 1, 2n - 1, ... have a row each.
    """

    every: int = 1

    def rows(self, recursion: "Recursion", x: jax.Array, train: bool) -> Rows:
        """The rows: arrays with a leading axis of loops // every; None if there are none.

        Args:
          recursion: the module, in which this may create parameters and make random keys.
          x: input of the first application.
          train: whether the model is in training.
        """
        raise NotImplementedError

    def enter(self, x: jax.Array, row: Row, first: jax.Array) -> jax.Array:
        """Changes the input of F, given that of the first application; only with every=1."""
        del row, first
        return x

    def weights(self, params: Any, row: Row) -> Any:
        """Changes the parameters of F for this application; only with every=1."""
        del row
        return params

    def given(self, row: Row, x: jax.Array, turn: Any) -> dict[str, Any]:
        """Keyword arguments of F; only with every=1."""
        del row, x, turn
        return {}

    def leave(self, x: jax.Array, row: Row) -> jax.Array:
        """Changes the output of F."""
        del row
        return x


class Recursion(nn.Module):
    """Applies `block` `loops` times with the same weights.

    Parameters: "block" (shared), and those of each `PerLoop` (with a leading axis of its rows).

    With backprop_loops = k, the gradient stops at the input of the last k applications, except
    where an adapter injects the input of the first, which keeps its gradient. The output
    is the same, and the memory of the backward pass is that of k applications.

    `unroll` (cycles per step of the scan) and `remat` change speed and memory only. `remat` names
    which activations the forward pass stores; the backward pass recomputes all others:
      "none": all are stored;
      "dots": the inputs of each F and NLL, and their matrix products with weights;
      "block": the inputs of each F and NLL, which are recomputed one at a time;
      "full": the input of each segment of about sqrt(loops) applications (Chen et al., "Training
        Deep Nets with Sublinear Memory Cost", 2016). The backward pass recomputes one segment at a
        time. A segment of more than two applications is itself recomputed as by "block".

    Shapes: those of the block, whose output has the shape of its input.

    Attributes:
      block: F, called as block(x, **given). It may have parameters only, no statistics. It is made
        with parent=None.
      loops: number of applications.
      turns: what F is given as `turn` at successive applications, if not None; they repeat.
      per_loop: what the applications have of their own, in the order in which it acts.
      backprop_loops: number of last applications that gradients pass through; None: all.
    """

    block: nn.Module
    loops: int
    turns: tuple[Hashable, ...] = (None,)
    per_loop: tuple[PerLoop, ...] = ()
    unroll: int = 1
    remat: str = "none"
    backprop_loops: int | None = None

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The output of the last application."""
        x, _ = self.observed(x, train=train)
        return x

    def observed(
        self, x: jax.Array, *, train: bool, observe: Observer | None = None
    ) -> tuple[jax.Array, Any]:
        """Applies the block; see `Recursion`.

        Args:
          x: input of the first application.
          train: whether the model is in training.
          observe: called with the input and the output of each application; None: nothing is.

        Returns:
          The output of the last application, and what `observe` returned, with a leading axis of
          loops; None without `observe`.
        """
        rows = self._rows(x, train)
        cut = max(0, self.loops - (self.backprop_loops or self.loops))
        if not cut or self.is_initializing():
            return self._apply(x, x, rows, 0, self.loops, observe)
        first = x
        x, early = jax.lax.stop_gradient(self._apply(x, first, rows, 0, cut, observe))
        x, late = self._apply(x, first, rows, cut, self.loops, observe)
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), early, late)

    def _apply(
        self,
        x: jax.Array,
        first: jax.Array,
        rows: tuple[Rows, ...],
        start: int,
        stop: int,
        observe: Observer | None,
    ) -> tuple[jax.Array, Any]:
        """Applications start .. stop - 1: a scan over whole cycles, then the others one by one."""
        length = self.period
        cycles, leftover = divmod(stop - start, length)
        segment = segment_length(cycles) if self.remat == "full" and cycles else None
        remat_part = self._remat_part((segment or 0) * length)
        cycle = Cycle(self.turns, self.per_loop, remat_part, first, start % length)
        if start:
            rows = tuple(
                _at(tree, slice(start // own.every, None))
                for own, tree in zip(self.per_loop, rows, strict=True)
            )

        counts = [length // own.every for own in self.per_loop]  # rows in one cycle
        seen = []
        if cycles:
            x, of_cycles = scan_cycles(
                functools.partial(cycle.apply, loops=length, observe=observe),
                self.block,
                x,
                tuple(_cycles(tree, cycles, n) for tree, n in zip(rows, counts, strict=True)),
                cycles=cycles,
                segment=segment,
                unroll=self.unroll,
            )
            seen.append(joined(of_cycles))  # (cycles, length, ...) -> (cycles * length, ...)
        if leftover:
            run = functools.partial(cycle.apply, loops=leftover, observe=observe)
            last = (
                _at(tree, slice(cycles * n, None)) for tree, n in zip(rows, counts, strict=True)
            )
            x, of_last = (remat(run) if self.remat == "full" else run)(self.block, x, tuple(last))
            seen.append(of_last)
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)

    def until(
        self,
        x: jax.Array,
        carry: Carry,
        update: Callable[[Carry, jax.Array, jax.Array], Carry],
        done: Callable[[Carry], jax.Array],
    ) -> Carry:
        """Applies the block in evaluation until `done`, at most `loops` times.

        It has no gradient. The program contains one cycle of applications.

        Args:
          x: input of the first application.
          carry: a tree of arrays.
          update: makes the next carry from the last one and from the input and the output of an
            application.
          done: whether no further application is needed; scalar.

        Returns:
          The carry after the last application.
        """
        rows = jax.tree.map(jnp.asarray, self._rows(x, train=False))  # the loop indexes them
        length = self.period
        cycle = Cycle(self.turns, self.per_loop, lambda part: part, first=x)

        def apply(i: int) -> Callable:
            """Application `loop` of the recursion, which is application i of its cycle."""
            return lambda block, x, loop: cycle.application(block, x, rows, i=i, loop=loop)

        def body(block: Any, state: tuple) -> tuple:
            loop, before, carry = state
            parts = [apply(i) for i in range(min(length, self.loops))]
            x = (
                nn.switch(loop % length, parts, block, before, loop)
                if len(parts) > 1
                else parts[0](block, before, loop)
            )
            return loop + 1, x, update(carry, before, x)

        def going_on(block: Any, state: tuple) -> Any:
            del block
            loop, _, carry = state
            return (loop < self.loops) & ~done(carry)

        _, _, carry = nn.while_loop(going_on, body, self.block, (jnp.zeros((), int), x, carry))
        return carry

    @nn.compact
    def _rows(self, x: jax.Array, train: bool) -> tuple[Rows, ...]:
        return tuple(own.rows(self, x, train) for own in self.per_loop)

    @property
    def period(self) -> int:
        """The number of applications after which turns and `PerLoop`s repeat together."""
        return period(self.turns, *(own.every for own in self.per_loop))

    def keys(self, stream: str) -> jax.Array:
        """One random key per application, split before any scan: remat and unroll change none."""
        return jax.random.split(self.make_rng(stream), self.loops)

    def _remat_part(self, applications: int) -> Callable[[Callable], Callable]:
        """The rematerialisation of F and NLLs, in segments of that many applications."""
        if self.remat in ("dots", "block") or applications > 2:
            return functools.partial(remat, dots=self.remat == "dots")
        return lambda part: part


def period(turns: tuple[Hashable, ...], *every: int) -> int:
    """The number of applications after which turns and `PerLoop`s repeat together."""
    return math.lcm(len(turns), *every)


@dataclasses.dataclass(frozen=True, eq=False)
class Cycle:
    """The body of the scan: the applications after which turns and `PerLoop`s repeat.

    Attributes:
      turns, per_loop: those of the `Recursion`.
      remat: wraps F and `PerLoop.leave` so that the backward pass recomputes them, or returns them
        as they are.
      first: the input of the recursion.
      start: number of the cycle's first application, modulo the length of a cycle.
    """

    turns: tuple[Hashable, ...]
    per_loop: tuple[PerLoop, ...]
    remat: Callable[[Callable], Callable]
    first: jax.Array
    start: int = 0

    def apply(
        self,
        block: Any,
        x: jax.Array,
        rows: tuple[Rows, ...],
        *,
        loops: int,
        observe: Observer | None = None,
    ) -> tuple[jax.Array, Any]:
        """Applies the block for the first `loops` loops of the cycle.

        Args:
          block: F.
          x: its input.
          rows: the rows of each `PerLoop` in this cycle.
          loops: number of applications, at most the length of the cycle.
          observe: see `Recursion.observed`.

        Returns:
          The output, and what was observed, with a leading axis of `loops`.
        """
        seen = []
        for i in range(loops):
            before = x
            x = self.application(block, x, rows, i=self.start + i, loop=i)
            if observe:
                seen.append(observe(before, x))
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen) if seen else None

    def application(
        self, block: Any, x: jax.Array, rows: tuple[Rows, ...], *, i: int, loop: int | jax.Array
    ) -> jax.Array:
        """One application: the block, then what each `PerLoop` does to its output.

        Args:
          block: F.
          x: its input.
          rows: the rows of each `PerLoop`.
          i: number of the application since turns and rows began together.
          loop: number of the application among those that the rows belong to.
        """
        own_rows = list(zip(self.per_loop, rows, strict=True))
        given = tuple(_at(tree, loop) if own.every == 1 else None for own, tree in own_rows)
        x = self.remat(functools.partial(self._apply_block, i=i))(block, x, given)
        for own, tree in own_rows:
            if tree is not None and (i + 1) % own.every == 0:
                row = (self.start + loop) // own.every - self.start // own.every
                leave = self.remat(functools.partial(_leave, own))
                x = leave(block, x, _at(tree, row))
        return x

    def _apply_block(self, block: Any, x: jax.Array, rows: tuple[Row, ...], *, i: int) -> jax.Array:
        turn = self.turns[i % len(self.turns)]
        given: dict[str, Any] = {} if turn is None else {"turn": turn}
        changes = []
        for own, row in zip(self.per_loop, rows, strict=True):
            if row is not None:
                x = own.enter(x, row, self.first)
                given |= own.given(row, x, turn)
                if type(own).weights is not PerLoop.weights:
                    changes.append(functools.partial(own.weights, row=row))
        run = functools.partial(type(block).__call__, **given)
        if changes and not block.is_initializing():
            run = nn.map_variables(run, "params", trans_in_fn=functools.partial(_changed, changes))
        out: jax.Array = run(block, x)
        return out


def _changed(changes: Sequence[Callable[[Any], Any]], variables: Any) -> Any:
    params = variables["params"]
    for change in changes:
        params = change(params)
    return {**variables, "params": params}


def _leave(own: PerLoop, block: Any, x: jax.Array, row: Row) -> jax.Array:
    del block  # `remat` passes a module as the first argument
    return own.leave(x, row)


def _at(tree: Any, index: int | slice | jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _cycles(tree: Any, cycles: int, count: int) -> Any:
    """Splits the leading axis into whole cycles: (cycles * count or more) -> (cycles, count)."""
    return jax.tree.map(
        lambda leaf: leaf[: cycles * count].reshape(cycles, count, *leaf.shape[1:]), tree
    )
