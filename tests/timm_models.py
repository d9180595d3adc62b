"""timm's own modules with random weights, and our models compared with them in all respects."""

import functools
import importlib
import importlib.util
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from sret_jax.models.apply import evaluation_logits, training_logits
from sret_jax.models.model import Model
from sret_jax.models.variables import abstract_variables

needs_timm = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "torchvision", "timm")),
    reason="needs timm: pip install -r requirements-test.txt",
)
# Relative to the largest entry; the deepest published model rounds to a tenth of them.
LIMITS = {"float64": 1e-10, "float32": 2e-5}


def import_timm() -> Any:
    """Imports timm; see `torch_peer.import_timm`."""
    return importlib.import_module("sret_jax.benchmarks.torch_peer").import_timm()


def timm_model(name: str, **settings: Any) -> Any:
    """Makes a model of timm with random float32 weights, which depend on their names alone.

    Args:
      name: its name in timm.
      **settings: arguments of its constructor that replace the published ones.
    """
    return with_random_weights(import_timm().create_model(name, **settings))


def with_random_weights(model: Any) -> Any:
    """Gives a module of timm random float32 weights, which depend on their names alone."""
    model.eval()
    for key, value in model.state_dict().items():  # masks and such are not in it
        if value.is_floating_point():
            value.data.copy_(_tensor(_weight(key, tuple(value.shape))))
    return model


def state_dict(theirs: Any) -> dict[str, np.ndarray]:
    """The state dict of a model of timm as float32 arrays."""
    return {name: tensor.numpy().astype("float32") for name, tensor in theirs.state_dict().items()}


def macs(name: str, **settings: Any) -> int:
    """The multiplications of a model of timm in the matrix products for one image of its size."""
    torch = importlib.import_module("torch")
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = import_timm().create_model(name, **settings).eval().requires_grad_(False)
        model(torch.empty(1, *model.pretrained_cfg["input_size"]))
    return counter.get_total_flops() // 2


def images(size: int, batch: int = 2) -> np.ndarray:
    """Standard normal images (batch, size, size, 3), the same for every model."""
    return np.random.default_rng([0, size]).standard_normal((batch, size, size, 3))


def check_parity(theirs: Any, ours: Model) -> None:
    """Asserts that our model computes the function of timm's, in evaluation and training.

    Compared are the names and numbers of arrays, both directions of the conversion (exactly),
    logits in float32 and float64, and in float64 the logits and all gradients in training mode.

    Args:
      theirs: from `timm_model`; it is left in float32 and in evaluation mode.
      ours: the model that it should equal, with drop_path_rate=0.
    """
    variables = check_conversion(theirs, ours)
    x = images(ours.image_size)
    check_logits(theirs, ours, variables, x.astype("float32"))
    with jax.enable_x64(True):
        theirs.double()
        ours = ours.clone(dtype=np.float64)
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), variables)
        check_logits(theirs, ours, variables, x)
        check_training_mode(theirs, ours, variables, x)
        theirs.float().eval()


def check_conversion(theirs: Any, ours: Model) -> dict[str, Any]:
    """Asserts that every array of timm's is converted or ignored, and returns our variables."""
    arrays = state_dict(theirs)
    variables = sret_jax.from_torch(arrays, ours)
    back = sret_jax.to_torch(variables, ours)
    assert back.keys() == {name for name in arrays if not name.endswith(ours.torch_ignored)}
    for name, array in back.items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_variables(ours))
    assert jax.tree.map(np.shape, variables) == shapes
    assert parameters(ours) == sum(p.numel() for p in theirs.parameters())
    return variables


def check_logits(theirs: Any, ours: Model, variables: Any, x: np.ndarray) -> None:
    """Asserts that the logits in evaluation are equal in the dtype of the images x."""
    logits = jax.jit(functools.partial(evaluation_logits, ours))(variables, x)
    assert logits.dtype == x.dtype
    with importlib.import_module("torch").no_grad():
        assert_close(logits, theirs(_nchw(x)).numpy(), "logits")


def check_training_mode(theirs: Any, ours: Model, variables: Any, x: np.ndarray) -> None:
    """Asserts that logits and gradients in training mode are equal in the dtype of x."""

    def loss(params, x):
        heads, _ = training_logits(ours, {**variables, "params": params}, x, jax.random.key(0))
        return sum((logits * c).sum() for logits, c in zip(heads, factors, strict=False)), heads

    rng = np.random.default_rng(1)
    factors = rng.standard_normal((2, len(x), ours.num_classes)).astype(x.dtype)
    compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, heads), gradients = compute(variables["params"], x)

    theirs.train()
    published = theirs(_nchw(x))
    published = published if isinstance(published, tuple) else (published,)
    sum((y * _tensor(c)).sum() for y, c in zip(published, factors, strict=False)).backward()
    for logits, expected in zip(heads, published, strict=True):
        assert_close(logits, expected.detach().numpy(), "logits in training mode")
    found = sret_jax.to_torch({**variables, "params": gradients}, ours)
    largest = max(float(parameter.grad.abs().max()) for parameter in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        assert found[name].dtype == x.dtype
        # A gradient that is 0 in exact arithmetic, such as that of a sum before LN, is rounded.
        assert_close(found[name], parameter.grad.numpy(), name, least=1e-3 * largest)
        parameter.grad = None


def check_initialisation(name: str, ours: Model, **settings: Any) -> None:
    """Asserts that parameters start as timm's do: constant, uniform or normal, as widely spread.

    Args:
      name: the model's name in timm.
      ours: the same model here.
      **settings: arguments of timm's constructor that replace the published ones.
    """
    importlib.import_module("torch").manual_seed(0)
    theirs = state_dict(import_timm().create_model(name, **settings))
    image = jnp.zeros((1, ours.image_size, ours.image_size, 3))
    found = sret_jax.to_torch(jax.jit(ours.init)(jax.random.key(0), image), ours)
    for key, expected in theirs.items():
        if np.ptp(expected) == 0:
            np.testing.assert_array_equal(found[key], expected, err_msg=key)
            continue
        many = expected.size >= 256
        spread = expected.std()
        assert found[key].std() == pytest.approx(spread, rel=0.2 if many else 0.5), key
        if many:  # a uniform array reaches 1.7 standard deviations, a normal one 3
            largest = np.abs(expected).max() / spread
            assert np.abs(found[key]).max() / found[key].std() == pytest.approx(largest, rel=0.3), (
                key
            )


def assert_close(ours: Any, published: np.ndarray, what: str, least: float = 0.0) -> None:
    """Asserts equality up to the limit of the dtype, relative to the largest entry or `least`."""
    atol = LIMITS[str(published.dtype)] * max(np.abs(published).max(), least)
    np.testing.assert_allclose(ours, published, rtol=0, atol=atol, err_msg=what)


def parameters(model: Model) -> int:
    """The number of parameters."""
    return sum(p.size for p in jax.tree.leaves(abstract_variables(model)["params"]))


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random value of an array: of order 1 after every layer, so that nothing vanishes."""
    n = np.random.default_rng([0, zlib.crc32(name.encode())]).standard_normal(shape)
    if len(shape) == 1:
        scale = name.endswith("weight")
        n = (1 if scale else 0) + 0.1 * n
    elif name.endswith("weight"):
        n /= np.sqrt(np.prod(shape[1:]))
    else:
        n *= 0.5  # positions, tokens and tables of biases
    return n.astype(np.float32)


def _tensor(x: np.ndarray) -> Any:
    return importlib.import_module("torch").from_numpy(np.array(x))


def _nchw(x: np.ndarray) -> Any:
    return _tensor(x.transpose(0, 3, 1, 2))
