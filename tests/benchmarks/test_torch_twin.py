"""The PyTorch twin computes what our model does, from the arrays that `to_torch` writes."""

import jax
import numpy as np
import pytest

import sret_jax
from tests import golden

torch = pytest.importorskip("torch", reason="the twin is written in torch")


def load_twin(name):
    from sret_jax.benchmarks.torch_twin import TorchTwin

    model = golden.build(name)
    variables = golden.variables(model)
    twin = TorchTwin(model)
    arrays = sret_jax.to_torch(variables, model)
    left = twin.load_state_dict({n: torch.tensor(a) for n, a in arrays.items()}, strict=False)
    assert not left.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in left.missing_keys)
    return model, variables, twin


@pytest.mark.parametrize("name", ["tiny_sliced", "tiny_unsliced_3_loops"])
def test_the_twin_s_logits_are_ours(name):
    model, variables, twin = load_twin(name)
    x = golden.images(0, 1, batch=2, size=model.image_size)
    with torch.inference_mode():
        theirs = twin.eval()(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))))
    ours = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def test_blocks_of_the_twin_are_shared_by_their_loops():
    _, variables, twin = load_twin("tiny_sliced")
    count = sum(p.numel() for p in twin.parameters())
    assert count == sum(p.size for p in jax.tree.leaves(variables["params"]))
