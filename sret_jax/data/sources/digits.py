"""Scikit-learn's handwritten digits as a TFDS data set: real scans that need no network.

1,797 scans of 8x8 pixels (E. Alpaydin and C. Kaynak, UCI, 1998). Scan i is a test image if
i % 5 == 4, else a training image: 1,438 and 359.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

# The bytes of the splits of version 1.0.0. A run recognises its images by them, so the PNG encoding
# must not change with the library.
SPLIT_BYTES = {"train": 229_576, "test": 57_301}

_DESCRIPTION = "1,797 handwritten digits, 8x8 pixels, as scikit-learn ships them."


class Digits(tfds.core.GeneratorBasedBuilder):
    """Optical recognition of handwritten digits, as scikit-learn ships them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=features,
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test: bool):
        from sklearn.datasets import load_digits

        digits = load_digits()
        for i, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            if (i % 5 == 4) == test:
                pixels = np.round(scan * (255 / 16)).astype(np.uint8)  # scans hold 0..16
                yield i, {"image": _png(pixels), "label": int(label)}

    def _download_and_prepare(self, dl_manager, download_config):
        super()._download_and_prepare(dl_manager, download_config)
        splits = self.info.splits.items()
        sized = [split.replace(num_bytes=SPLIT_BYTES[name]) for name, split in splits]
        self.info.set_splits(tfds.core.splits.SplitDict(sized))


def _png(pixels: np.ndarray) -> bytes:
    """Encodes an image (8, 8) as a PNG file. TFDS would need TensorFlow to encode an array."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
