"""The augmentation that runs on the device: random erasing, mixup and cutmix.

Every row of a batch has its own key, derived from its position in the stream. So the result does
not depend on batch size, devices or hosts. Rows 2i and 2i+1 are mixed with each other; both lie on
the same device.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax

from sret_jax.errors import UserError

Targets = dict[str, jax.Array]

AUGMENT_STREAM = 1
ERASE_ATTEMPTS = 10
ERASE_AREA = (0.02, 1 / 3)  # share of the image
ERASE_ASPECT = (0.3, 1 / 0.3)  # height / width


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Random erasing, then mixup or cutmix in pairs, with labels to match (timm's mode "pair").

    Attributes:
      erasing: probability that a rectangle of an image becomes noise; 0: never.
      mixup: alpha of mixup's lambda ~ Beta(alpha, alpha); 0: no mixup.
      cutmix: alpha of cutmix's lambda ~ Beta(alpha, alpha); 0: no cutmix.
      mix_switch: probability of cutmix, rather than mixup, if both are on.
      mix_prob: probability that a pair is mixed at all.
      label_smoothing: part of a label's weight that is spread over all classes.
    """

    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_switch: float = 0.5
    mix_prob: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self):
        for name in ("erasing", "mix_switch", "mix_prob"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"config.augment.{name}={value} must be a probability in [0, 1]")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"config.augment.{name}={value} must be 0 (off) or above")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"config.augment.label_smoothing={self.label_smoothing} must be in [0, 1)"
            )

    @property
    def in_pairs(self) -> bool:
        """Whether any pairs are mixed."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def hard_targets(self, labels: jax.Array, num_classes: int) -> jax.Array:
        """One-hot labels, smoothed.

        Shapes: (B,) -> (B, K).
        """
        return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), self.label_smoothing)

    def __call__(
        self, images: jax.Array, targets: Targets, keys: jax.Array, *, in_turn: bool = False
    ) -> tuple[jax.Array, Targets]:
        """Applies random erasing, then mixup or cutmix.

        Args:
          images: normalised, (B, H, W, 3); B is even if pairs are mixed.
          targets: {name: (B, K)}; all are mixed with the images' weights.
          keys: (B,), from `row_keys`.
          in_turn: erases one image after another, and draws noise for the erased images only.

        Returns:
          Images and targets of the same shapes.
        """
        erase_keys, mix_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        if self.erasing:
            erase_one = functools.partial(erase, probability=self.erasing)
            if in_turn:
                images = jax.lax.map(lambda row: erase_one(*row), (images, erase_keys))
            else:
                images = jax.vmap(erase_one)(images, erase_keys)
        if self.in_pairs:
            image_pairs, target_pairs = jax.tree.map(_to_pairs, (images, targets))
            mixed = jax.vmap(self._mix_pair)(image_pairs, target_pairs, mix_keys[::2])
            images, targets = jax.tree.map(_from_pairs, mixed)
        return images, targets

    def _mix_pair(
        self, images: jax.Array, targets: Targets, key: jax.Array
    ) -> tuple[jax.Array, Targets]:
        """Mixes each row with the other. Shapes: (2, H, W, 3), {name: (2, K)} -> the same."""
        use_key, cut_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 5)
        mixed = jax.random.bernoulli(use_key, self.mix_prob)
        cut = self.cutmix > 0 and (
            self.mixup == 0 or jax.random.bernoulli(cut_key, self.mix_switch)
        )
        inside = jnp.zeros(images.shape[1:3], bool)
        keep = jnp.ones(())
        if self.mixup:
            keep = jax.random.beta(mixup_key, self.mixup, self.mixup)
        if self.cutmix:
            box = cut_box(box_key, jax.random.beta(cutmix_key, self.cutmix, self.cutmix), inside)
            inside = box & cut & mixed
            keep = jnp.where(cut, 1 - box.mean(), keep)
        keep = jnp.where(mixed, keep, 1.0)
        blended = keep * images + (1 - keep) * images[::-1]
        pasted = jnp.where(inside[:, :, None], images[::-1], images)
        targets = jax.tree.map(lambda y: keep * y + (1 - keep) * y[::-1], targets)
        return jnp.where(cut, pasted, blended), targets


def erase(image: jax.Array, key: jax.Array, probability: float) -> jax.Array:
    """Random erasing (Zhong et al. 2020), pixel mode: a rectangle becomes N(0, 1) noise.

    Up to ten rectangles are drawn, with area uniform in [2%, 33%] of the image and h/w log-uniform
    in [0.3, 3.3]; the first that fits is used.

    Shapes: (H, W, 3) normalised -> the same.
    """
    height, width, _ = image.shape
    use_key, area_key, aspect_key, top_key, left_key, noise_key = jax.random.split(key, 6)
    low, high = ERASE_AREA
    area = height * width * jax.random.uniform(area_key, (ERASE_ATTEMPTS,), None, low, high)
    low, high = map(math.log, ERASE_ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect_key, (ERASE_ATTEMPTS,), None, low, high))
    heights = jnp.round(jnp.sqrt(area * aspect)).astype(int)
    widths = jnp.round(jnp.sqrt(area / aspect)).astype(int)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    h, w = heights[first], widths[first]
    top = jax.random.randint(top_key, (), 0, height - h + 1)
    left = jax.random.randint(left_key, (), 0, width - w + 1)
    used = jax.random.bernoulli(use_key, probability) & fits[first]
    inside = rectangle(top, left, top + h, left + w, (height, width))

    def erased(image: jax.Array) -> jax.Array:
        return jnp.where(inside[:, :, None], jax.random.normal(noise_key, image.shape), image)

    return jax.lax.cond(used, erased, lambda image: image, image)


def cut_box(key: jax.Array, keep: jax.Array, like: jax.Array) -> jax.Array:
    """CutMix's box (Yun et al. 2019, eq. 2): sides sqrt(1 - keep), uniform centre, clipped.

    Shapes: a fraction `keep`, an array (H, W) -> (H, W) bool, True inside the box.
    """
    height, width = like.shape
    ratio = jnp.sqrt(1 - keep)
    half_height = (height * ratio).astype(int) // 2
    half_width = (width * ratio).astype(int) // 2
    y_key, x_key = jax.random.split(key)
    y = jax.random.randint(y_key, (), 0, height)
    x = jax.random.randint(x_key, (), 0, width)
    return rectangle(
        y - half_height, x - half_width, y + half_height, x + half_width, (height, width)
    )


def rectangle(
    top: jax.Array, left: jax.Array, bottom: jax.Array, right: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """(H, W) bool, True in rows [top, bottom) and columns [left, right)."""
    y, x = jnp.arange(shape[0])[:, None], jnp.arange(shape[1])[None, :]
    return ((y >= top) & (y < bottom)) & ((x >= left) & (x < right))


def row_keys(seed: jax.typing.ArrayLike, step: jax.Array, batch_size: int) -> jax.Array:
    """A key for each row of global batch `step`; it depends on seed and position modulo 2^32.

    Shapes: -> (B,).
    """
    positions = step.astype(jnp.uint32) * jnp.uint32(batch_size) + jnp.arange(
        batch_size, dtype=jnp.uint32
    )
    key = jax.random.fold_in(jax.random.key(seed), AUGMENT_STREAM)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def _to_pairs(x: jax.Array) -> jax.Array:
    return x.reshape(-1, 2, *x.shape[1:])


def _from_pairs(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])
