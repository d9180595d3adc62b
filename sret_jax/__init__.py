"""sret_jax: training the Sliced Recursive Transformer (ECCV 2022) in JAX and Flax."""

from etils import epy

__version__ = "0.1.0"

with epy.lazy_api_imports(globals()):
    from sret_jax.config_files import get_config
    from sret_jax.errors import UserError
    from sret_jax.evaluation.predict import predict
    from sret_jax.models.adapters import list_adapters
    from sret_jax.models.attention_maps import attention_maps
    from sret_jax.models.inspection import attention_groups, residual_coefficients
    from sret_jax.models.loops import with_loops
    from sret_jax.models.registry import create_model, list_models
    from sret_jax.parallel.preemption import Preempted
    from sret_jax.run.curves import draw_curves
    from sret_jax.run.fit import fit
    from sret_jax.weights.loading import class_names, load, test_crop
    from sret_jax.weights.torch_names import from_torch, to_torch

__all__ = [
    "Preempted",
    "UserError",
    "attention_groups",
    "attention_maps",
    "class_names",
    "create_model",
    "draw_curves",
    "fit",
    "from_torch",
    "get_config",
    "list_adapters",
    "list_models",
    "load",
    "predict",
    "residual_coefficients",
    "test_crop",
    "to_torch",
    "with_loops",
]
