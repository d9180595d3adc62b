"""Runs an exported model: prints the five likeliest classes of each image.

pip install -r requirements.txt
python run.py IMAGE...

logits = load()(images)  # (B, S, S, 3) uint8 RGB -> (B, classes) float32, any B

If the model was exported with a rule by which images leave early, it returns (logits, loops).
"""

import argparse
import json
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import ExifTags, Image

HERE = pathlib.Path(__file__).resolve().parent
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")  # the others are never parsed
UPRIGHT = {  # what undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LONGEST = 16  # sides, beyond which only the central square is resized


def load() -> Callable[[Any], Any]:
    """The model: (B, S, S, 3) uint8 RGB images, prepared by `preprocess` -> logits (B, classes).

    Or -> (logits, loops), where loops is the number of loops of each image, (B,) int32.

    Raises:
      RuntimeError: this jax cannot read the model; the message names both versions.
    """
    try:
        from jax import export  # not in the oldest versions of jax

        exported = export.deserialize(bytearray((HERE / "model.stablehlo").read_bytes()))
        model = jax.jit(exported.call)
        size = exported.in_avals[0].shape[1]
        model.lower(jax.ShapeDtypeStruct((1, size, size, 3), np.uint8))  # parses the program
    except Exception as e:
        requirements = (HERE / "requirements.txt").read_text(encoding="utf-8").split()
        written_by = next(line for line in requirements if line.startswith("jax=="))[len("jax==") :]
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise RuntimeError(
            f"model.stablehlo was written by jax {written_by}, and jax {jax.__version__} here "
            f"cannot read it ({reason}); pip install -r {HERE / 'requirements.txt'}"
        ) from e
    return model


def preprocess(image: Image.Image) -> np.ndarray:
    """An image of any size and mode -> (S, S, 3) uint8: resized, and its central square cut out."""
    spec = json.loads((HERE / "preprocess.json").read_text(encoding="utf-8"))
    short, size = spec["resize_shorter_side"], spec["center_crop"]
    image = upright_rgb(image)
    width, height = (max(short, short * side // min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    square = (left, top, left + size, top + size)
    if max(width, height) <= LONGEST * short:
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop(square)
    else:
        x, y = image.width / width, image.height / height
        box = (square[0] * x, square[1] * y, square[2] * x, square[3] * y)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Applies EXIF's orientation, cuts 16 bits to the upper 8, and leaves transparency out."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises almost anything on a damaged tag
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file")
    args = parser.parse_args()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    labels = json.loads((HERE / "labels.json").read_text(encoding="utf-8"))
    try:
        model = load()
    except RuntimeError as e:
        sys.exit(f"Error: {e}")
    for path in args.images:
        try:
            with Image.open(path, formats=FORMATS) as image:
                pixels = preprocess(image)
        except Exception as e:  # Pillow raises almost anything on damaged bytes
            sys.exit(f"Error: {path} cannot be read ({e})")
        found = model(pixels[None])
        logits, loops = found if isinstance(found, tuple | list) else (found, None)
        logits = np.asarray(logits)[0]
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities)[:5]
        shown = ", ".join(f"{100 * probabilities[i]:.1f}% {labels[i]}" for i in best)
        count = 0 if loops is None else int(loops[0])
        after = f" (after {count} loop{'s' * (count > 1)})" if count else ""
        print(f"{path}: {shown}{after}")


if __name__ == "__main__":
    main()
