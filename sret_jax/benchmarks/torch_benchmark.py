"""Steps and products of PyTorch, eager and compiled, to be timed beside ours."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from sret_jax.benchmarks.products import Product
from sret_jax.benchmarks.torch_peer import torch_peer
from sret_jax.models.model import Model
from sret_jax.parallel.host import available_cores

__all__ = ["TorchProduct", "TorchStep", "torch_peer"]


class TorchStep:
    """One train step (loss, gradient, AdamW) or inference of a model's `torch_peer`, on noise.

    It does less than ours: no augmentation, no moving average, no check that losses are finite.

    Attributes:
      images: images per step.
      flops: FLOPs per step, counted as ours are.
    """

    def __init__(
        self,
        peer: nn.Module,
        model: Model,
        images: int,
        flops: int,
        *,
        train: bool,
        compiled: bool,
    ):
        torch.set_num_threads(available_cores())
        self.images, self.flops = images, flops
        self._peer = copy.deepcopy(peer).train(train)
        self._apply = torch.compile(self._peer) if compiled else self._peer
        self._optimizer = torch.optim.AdamW(self._peer.parameters(), lr=1e-4, weight_decay=0.05)
        self._batch = torch.randn(images, 3, model.image_size, model.image_size)
        self._labels = torch.randint(model.num_classes, (images,))

    @classmethod
    def both(
        cls, peer: nn.Module, model: Model, images: int, flops: int, train: bool
    ) -> dict[str, "TorchStep"]:
        """The eager and the compiled step, by the names that reports use."""
        names = {"torch eager": False, "torch.compile": True}
        return {
            name: cls(peer, model, images, flops, train=train, compiled=compiled)
            for name, compiled in names.items()
        }

    def __call__(self) -> None:
        if not self._peer.training:
            with torch.inference_mode():
                self._apply(self._batch)
            return
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self._apply(self._batch), self._labels, label_smoothing=0.1)
        loss.backward()
        self._optimizer.step()


class TorchProduct:
    """A product of two arrays of ones, computed by `torch.einsum`.

    Attributes:
      flops: FLOPs of the product, counted as ours are.
    """

    def __init__(self, product: Product):
        torch.set_num_threads(available_cores())
        self.flops = product.flops
        self._equation = product.equation
        dtype = getattr(torch, product.dtype)
        self._operands = [torch.ones(shape, dtype=dtype) for shape in (product.left, product.right)]

    def __call__(self) -> None:
        torch.einsum(self._equation, *self._operands)
