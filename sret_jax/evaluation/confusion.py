"""Which classes are confused: accuracy by class, and a picture of the confusion matrix."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sret_jax.data.sources.imagenet import display_names
from sret_jax.files import write_json
from sret_jax.picture import picture

PER_CLASS_FILE, CONFUSION_FILE = "per_class.json", "confusion.png"
MOST_CLASSES = 2000  # counting more would cost noticeable time and memory
MOST_DRAWN = 200  # a picture of more classes would be unreadable
MOST_NUMBERS = 20  # the picture contains counts for up to so many classes
WORST = 3  # number of classes named in one line


def count(logits: jax.Array, labels: jax.Array, real: jax.Array, readable: jax.Array) -> jax.Array:
    """Counts by label and prediction; the last column counts images that cannot be read.

    Shapes: logits (B, K), the rest (B,) -> (K, K + 1) int32.
    """
    classes = logits.shape[-1]
    predicted = jnp.where(readable, logits.argmax(-1), classes)
    zeros = jnp.zeros((classes, classes + 1), jnp.int32)
    return zeros.at[labels, predicted].add(real.astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class Confusion:
    """The confusion counts of one evaluation.

    Attributes:
      counts: (K, K + 1), from `count`.
      class_names: K names; ImageNet's classes have their WordNet ids.
    """

    counts: np.ndarray
    class_names: list[str]

    @property
    def names(self) -> list[str]:
        """The K class names to show to people."""
        return display_names(self.class_names)

    @property
    def few(self) -> bool:
        """Whether the classes are few enough for a picture."""
        return len(self.class_names) <= MOST_DRAWN

    @property
    def images(self) -> np.ndarray:
        """The number of images of each class; (K,)."""
        return self.counts.sum(-1)

    @property
    def accuracy(self) -> np.ndarray:
        """The fraction of each class's images that are recognised, nan without images; (K,)."""
        with np.errstate(invalid="ignore"):
            return np.diagonal(self.counts) / self.images

    def worst(self) -> str:
        """One line about the classes with the lowest accuracy."""
        accuracy = self.accuracy
        order = [k for k in np.argsort(accuracy, kind="stable") if accuracy[k] < 1]
        if not order:
            return "Every image of every class is recognised."
        return "Worst classes: " + "; ".join(map(self._in_words, order[:WORST])) + "."

    def _in_words(self, k: int) -> str:
        others = self.counts[k].copy()
        others[k] = 0
        names = [*self.names, "unreadable"]
        words = f"{names[k]!r} {100 * self.accuracy[k]:.1f}% of {self.images[k]:,}"
        if not others.any():
            return words
        taken = others.argmax()
        return f"{words} ({others[taken]:,} taken for {names[taken]!r})"

    def to_json(self) -> dict[str, Any]:
        """The contents for per_class.json: accuracy by class, null for a class without images.

        ImageNet's classes are listed by WordNet id and have a name too. For few classes the counts
        are included.
        """
        columns = (self.class_names, self.names, self.images.tolist(), self.accuracy.tolist())
        per_class = {
            key: {
                **({} if name == key else {"name": name}),
                "images": images,
                "top1": top1 if images else None,
            }
            for key, name, images, top1 in zip(*columns, strict=True)
        }
        return {"per_class": per_class} | ({"confusion": self.counts.tolist()} if self.few else {})

    def draw(self, path: epath.Path, step: int) -> None:
        """Draws the fraction of each true class (row) that is predicted as each class (column)."""
        from matplotlib.colors import PowerNorm

        classes = len(self.class_names)
        shares = self.counts[:, :classes] / np.maximum(self.images, 1)[:, None]
        side = float(np.clip(3 + 0.32 * classes, 4.5, 14))
        with picture(path, side + 1, side) as figure:
            axes = figure.subplots()
            image = axes.imshow(
                shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1)
            )  # shows rare errors
            figure.colorbar(image, label="share of the true class", shrink=0.8)
            names = [name if len(name) <= 16 else name[:15] + "…" for name in self.names]
            size = min(9.0, 600 / max(classes, 1))
            axes.set_xticks(range(classes), names, rotation=90, fontsize=size, parse_math=False)
            axes.set_yticks(range(classes), names, fontsize=size, parse_math=False)
            axes.set_xlabel("predicted")
            axes.set_ylabel("true")
            recognised = np.trace(self.counts) / self.images.sum()
            axes.set_title(
                f"step {step:,}: {100 * recognised:.2f}% of {self.images.sum():,} images"
            )
            if classes <= MOST_NUMBERS:
                for row, column in np.argwhere(self.counts[:, :classes]):
                    colour = "white" if shares[row, column] > 0.3 else "black"
                    text = f"{self.counts[row, column]:,}"
                    axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=8)


def write_confusions(workdir: epath.Path, step: int, confusions: dict[str, Confusion]) -> None:
    """Writes per_class.json and, for few classes, confusion.png of the raw weights.

    Args:
      workdir: folder to write to.
      step: step of the weights.
      confusions: confusion counts by name of the weights, including "eval" (raw weights).
    """
    content = {name: confusion.to_json() for name, confusion in confusions.items()}
    write_json(workdir / PER_CLASS_FILE, {"step": step, **content})
    if confusions["eval"].few:
        confusions["eval"].draw(workdir / CONFUSION_FILE, step)
