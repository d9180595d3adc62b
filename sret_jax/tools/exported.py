"""Runs an exported model: python run.py IMAGE... (needs jax, numpy and pillow, nothing else).

logits = load()(images)  # (B, S, S, 3) uint8 RGB -> (B, classes) float32, any B
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export
from PIL import Image, ImageOps

HERE = pathlib.Path(__file__).resolve().parent


def load() -> Callable[[Any], jax.Array]:
    """The model: (B, S, S, 3) uint8 RGB images, prepared by `preprocess` -> logits (B, classes)."""
    exported = export.deserialize(bytearray((HERE / "model.stablehlo").read_bytes()))
    return jax.jit(exported.call)


def preprocess(image: Image.Image) -> np.ndarray:
    """An image of any size -> (S, S, 3) uint8: shorter side resized, central square cut out."""
    spec = json.loads((HERE / "preprocess.json").read_text(encoding="utf-8"))
    short, size = spec["resize_shorter_side"], spec["center_crop"]
    image = ImageOps.exif_transpose(image).convert("RGB")
    width, height = (max(short, short * side // min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def main() -> None:
    """Prints the five likeliest classes of each image."""
    labels = json.loads((HERE / "labels.json").read_text(encoding="utf-8"))
    model = load()
    for path in sys.argv[1:]:
        try:
            with Image.open(path) as image:
                pixels = preprocess(image)
        except OSError as e:
            sys.exit(f"{path} cannot be read ({e})")
        logits = np.asarray(model(pixels[None]))[0]
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities)[:5]
        print(f"{path}: " + ", ".join(f"{100 * probabilities[i]:.1f}% {labels[i]}" for i in best))


if __name__ == "__main__":
    main()
