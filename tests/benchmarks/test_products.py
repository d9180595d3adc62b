"""The products found in a program are those that it computes; each is timed by itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from sret_jax.benchmarks.product_benchmark import benchmark_products
from sret_jax.benchmarks.products import ATTENTION, GRADIENTS, MAPS, XLAProduct, products
from sret_jax.errors import UserError
from sret_jax.models.flops import count_macs, model_macs
from sret_jax.models.variables import abstract_variables
from sret_jax.settings.config_model import create_from_config
from tests.conftest import run_python


@pytest.mark.parametrize(
    ("equation", "left", "right", "kind"),
    [
        ("bnd,bmd->bnm", (2, 3, 4), (2, 5, 4), ATTENTION),
        ("bmn,bmd->bnd", (2, 5, 3), (2, 5, 4), ATTENTION),
        ("nc,nf->cf", (6, 3), (6, 4), GRADIENTS),
        ("nc,cf->nf", (6, 3), (3, 4), MAPS),
        ("nf,cf->nc", (6, 4), (3, 4), MAPS),
    ],
)
def test_a_product_is_found_with_its_equation_its_flops_and_what_takes_it(
    equation, left, right, kind
):
    a, b = (np.random.RandomState(i).randn(*shape) for i, shape in enumerate((left, right)))
    ((product, times),) = products(
        jax.make_jaxpr(lambda a, b: jnp.einsum(equation, a, b))(a, b).jaxpr
    ).items()
    assert times == 1 and product.kind == kind
    np.testing.assert_allclose(
        np.einsum(product.equation, a, b),
        jax.lax.dot_general(a, b, product.dimensions),
        rtol=1e-5,
    )
    assert product.flops == 2 * count_macs(lambda a, b: jnp.einsum(equation, a, b), a, b)


def test_a_product_in_a_loop_counts_as_often_as_the_loop_runs_and_of_a_choice_the_dearest():
    def program(x):
        x, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x.T, x)

    found = products(jax.make_jaxpr(program)(jnp.ones((4, 4))).jaxpr)
    assert list(found.values()) == [5]


def test_the_products_of_a_model_are_all_of_its_multiply_accumulates_but_the_convolutions():
    model = create_from_config(quickstart.get_config(), num_classes=10)
    image = jnp.ones((1, model.image_size, model.image_size, 3))
    jaxpr = jax.make_jaxpr(model.apply)(abstract_variables(model), image).jaxpr
    whole = sum(times * product.flops for product, times in products(jaxpr).items())
    first, second = model.widths
    stem = 9 * (16 * 16 * 3 * first // 2 + 8 * 8 * first // 2 * first + 4 * 4 * first * first)
    pooling = 9 * 2 * 2 * second  # of 32 pixels, eight times smaller before and sixteen after
    assert whole == 2 * (model_macs(model) - stem - pooling)


def test_xla_s_product_runs_the_product_it_is_made_of():
    (product,) = products(jax.make_jaxpr(lambda x: x @ x.T)(jnp.ones((8, 4), "bfloat16")).jaxpr)
    task = XLAProduct(product)
    task()
    assert task.flops == 2 * 8 * 8 * 4


def test_products_are_timed_on_one_device_only():
    with pytest.raises(UserError, match=r"one CPU device, here are 8 cpu; use train"):
        benchmark_products(quickstart.get_config(), rounds=1, against=None, json_file=None)


@pytest.mark.slow  # compiles a train step
@pytest.mark.parametrize("against", [[], ["--against=torch"]])
def test_the_products_of_a_train_step_are_timed_beside_it(tmp_path, against):
    if against:
        pytest.importorskip("torch", reason="the products compared are PyTorch's")
    file = tmp_path / "figures.json"
    command = ["-m", "sret_jax.tools.benchmark", "products", "--rounds=1", f"--json={file}"]
    run = run_python(*command, "--config=configs/quickstart.py", *against)
    assert run.returncode == 0, run.stderr
    report = json.loads(file.read_text())
    assert list(report["seconds"]) == (["ours", "torch"] if against else ["ours"])
    for seconds in report["seconds"].values():
        assert min(seconds.values()) > 0
        assert seconds["all"] == pytest.approx(sum(seconds.values()) / 2)
        assert f"{seconds['all']:.3f} s" in run.stdout
