"""The training stream with stored soft labels: several labelled crops of each image."""

from typing import Any

import grain
import numpy as np

from sret_jax.data.order import Positions, Rows
from sret_jax.data.views.crops import replay_views
from sret_jax.data.views.images import BadImage
from sret_jax.distillation.soft_labels import SoftLabels


class LabelledCrops(Positions):
    """Each element yields m rows: m labelled crops of one image.

    Element g of the parent becomes positions [g m, (g + 1) m). In pass t over the N images,
    t = g div N, an image shows its stored crops t m to t m + m - 1 (modulo K), so all K crops are
    seen before one repeats. A row also contains its label: "soft" (k,) float16 and, unless all
    classes are stored, "soft_classes" (k,).
    """

    def __init__(self, parent: grain.MapDataset, labels: SoftLabels, crops_per_image: int):
        self._size = labels.manifest.law.image_size
        self.rows = crops_per_image
        super().__init__(parent, self._size, replace=True)
        label_bytes = sum(kind.itemsize for kind in labels.manifest.row_labels.values())
        self.element_bytes += self.rows * label_bytes
        self._labels = labels

    def show(self, index: int, element: dict[str, Any]) -> Rows:
        """See `Positions`."""
        stored = self._labels[element["record"]]
        if not len(stored):
            raise BadImage("it could not be read when its labels were made")
        first = index // len(self._labels) * self.rows
        crops = stored[(first + np.arange(self.rows)) % len(stored)]
        return {
            "image": replay_views(element["image"], crops, self._size),
            "label": np.full(self.rows, element["label"], np.int32),
            **{name: crops[name] for name in self._labels.manifest.row_labels},
        }

    def chunks(self, elements: int) -> grain.MapDataset:
        """See `Positions`."""
        return super().chunks(elements).map(_join_rows)


def _join_rows(chunk: Rows) -> Rows:
    """Shapes: (elements, m, ...) -> (elements * m, ...)."""
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in chunk.items()}
