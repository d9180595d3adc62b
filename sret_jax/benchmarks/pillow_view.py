"""timm's training view, with Pillow alone: the reference for the input pipeline's speed."""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from sret_jax.data.views.pixels import FILL
from sret_jax.data.views.randaugment import INCREASING, RandAugment
from sret_jax.data.views.training_view import TrainTransform


@dataclasses.dataclass(frozen=True)
class PillowTransform(TrainTransform):
    """`TrainTransform`, computed by Pillow operation by operation with the same random choices.

    Of RandAugment it supports only the increasing operations.

    Shapes: an image -> (3, size, size) uint8.
    """

    def __call__(self, data: bytes, rng: np.random.Generator) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = self.sample_box(image.width, image.height, rng)
        image = image.crop(box).resize((self.size, self.size), Image.Resampling.BICUBIC)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if isinstance(self._policy, RandAugment):
            image = _augment(image, self._policy, rng)
        return np.asarray(image).transpose(2, 0, 1)  # PyTorch's layout


def _augment(image: Image.Image, policy: RandAugment, rng: np.random.Generator) -> Image.Image:
    names = tuple(INCREASING)
    for i in rng.integers(0, len(names), int(policy.n)):
        if rng.random() < policy.p:
            image = _apply(names[i], image, policy, rng)
    return image


def _apply(
    name: str, image: Image.Image, policy: RandAugment, rng: np.random.Generator
) -> Image.Image:
    operation = INCREASING[name]
    if operation.argument is None:
        return apply_pillow(name, image)
    level = policy.draw_level(rng)
    sign = -1 if operation.signed and rng.random() < 0.5 else 1
    return apply_pillow(name, image, operation.argument(sign * level / 10))


def apply_pillow(name: str, image: Image.Image, argument: float = 0.0) -> Image.Image:
    """Applies one of the fifteen increasing operations."""
    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Rotate":
            return image.rotate(argument, Image.Resampling.BICUBIC, fillcolor=FILL)
        case "PosterizeIncreasing":
            # Pillow does not accept 0 bits.
            return ImageOps.posterize(image, int(argument)) if argument else image.point([0] * 768)
        case "SolarizeIncreasing":
            return ImageOps.solarize(image, int(argument))
        case "SolarizeAdd":
            table = [min(255, v + int(argument)) if v < 128 else v for v in range(256)]
            return image.point(table * 3)
        case "ColorIncreasing":
            return ImageEnhance.Color(image).enhance(argument)
        case "ContrastIncreasing":
            return ImageEnhance.Contrast(image).enhance(argument)
        case "BrightnessIncreasing":
            return ImageEnhance.Brightness(image).enhance(argument)
        case "SharpnessIncreasing":
            return ImageEnhance.Sharpness(image).enhance(argument)
        case "ShearX":
            return _warp(image, (1, argument, 0, 0, 1, 0))
        case "ShearY":
            return _warp(image, (1, 0, 0, argument, 1, 0))
        case "TranslateXRel":
            return _warp(image, (1, 0, argument * image.width, 0, 1, 0))
        case "TranslateYRel":
            return _warp(image, (1, 0, 0, 0, 1, argument * image.height))
    raise KeyError(name)


def _warp(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BICUBIC,
        fillcolor=FILL,
    )
