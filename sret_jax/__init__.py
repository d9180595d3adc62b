"""sret_jax: training the Sliced Recursive Transformer (ECCV 2022) in JAX and Flax."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from sret_jax.checkpoints.torch_names import from_torch, to_torch
    from sret_jax.models.loops import with_loops
    from sret_jax.models.sret import create_model
    from sret_jax.models.variants import list_models
    from sret_jax.training.fit import fit
    from sret_jax.training.predict import predict
    from sret_jax.training.pretrained import class_names, load

__all__ = [
    "class_names",
    "create_model",
    "fit",
    "from_torch",
    "list_models",
    "load",
    "predict",
    "to_torch",
    "with_loops",
]
