"""Numbers computed by the published implementation, and the weights that it used."""

import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import sret_jax
from sret_jax.models.model import Model
from sret_jax.models.variables import abstract_variables

DATA = pathlib.Path(__file__).parent / "data"
MODELS = json.loads((DATA / "golden_models.json").read_text())
ARRAYS = np.load(DATA / "golden.npz")
ARRAYS64 = np.load(DATA / "golden64.npz")


def build(name: str, **overrides) -> Model:
    """Builds our model with the arguments of a golden model."""
    kwargs = MODELS[name]["kwargs"]
    first, second = kwargs.get("groups1"), kwargs.get("groups2")
    settings = dict(
        num_classes=kwargs.get("num_classes", 1000),
        image_size=kwargs["image_size"],
        blocks=kwargs["recursive_num"],
        loops=kwargs["depth"][0] // kwargs["recursive_num"][0],
        groups=tuple(zip(first, second, strict=True)) if first else None,
        heads=kwargs["heads"],
        dim=kwargs["base_dims"][0],
        mlp_ratio=kwargs["mlp_ratio"],
        nll_ratio=kwargs["np_mlp_ratio"],
        drop_path_rate=0.0,
    )
    return sret_jax.create_model("sret_t", **{**settings, **overrides})


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The generated value of a parameter or buffer; it depends on its canonical name."""
    rng = np.random.default_rng([0, zlib.crc32(name.encode())])
    n = rng.standard_normal(shape).astype(np.float32)
    if "coefficient" in name:
        return 1 + 0.1 * n
    if name.endswith("running_mean"):
        return 0.1 * n
    if name.endswith("running_var"):
        return np.exp(0.1 * n)
    if name == "pos_embed":
        return 0.02 * n
    if name.endswith("bias"):
        return 0.1 * n
    if name.endswith("weight") and len(shape) == 1:
        return 1 + 0.1 * n
    return n / np.sqrt(np.prod(shape[1:])).astype(np.float32)


def state_dict(model: Model) -> dict[str, np.ndarray]:
    """The generated state dict of a model; copies of a shared block are equal."""
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), abstract_variables(model))
    published = sret_jax.to_torch(zeros, model)
    canonical: dict = {}
    for entry in model.torch_entries():
        canonical.setdefault((entry.path, entry.row), entry.torch_name)
    return {
        entry.torch_name: weight(
            canonical[entry.path, entry.row], published[entry.torch_name].shape
        )
        for entry in model.torch_entries()
    }


def variables(model: Model, dtype: str = "float32") -> dict:
    """The generated weights as Flax variables: float32 numbers, as arrays of a dtype."""
    weights = sret_jax.from_torch(state_dict(model), model)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), weights)


def images(*seed: int, batch: int, size: int) -> np.ndarray:
    """Standard normal images (batch, size, size, 3), drawn as NCHW."""
    nchw = np.random.default_rng(seed).standard_normal((batch, 3, size, size))
    return nchw.astype(np.float32).transpose(0, 2, 3, 1)


def adamw_batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels for a step of the 40-step AdamW curve."""
    rng = np.random.default_rng([0, 100 + step])
    labels = rng.integers(0, 10, 16)
    nchw = rng.standard_normal((16, 3, 64, 64))
    nchw += 0.5 * np.sin((labels + 1)[:, None, None, None] * np.arange(64) / 10)
    return nchw.astype(np.float32).transpose(0, 2, 3, 1), labels
