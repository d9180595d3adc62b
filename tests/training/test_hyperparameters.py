import jax
import numpy as np
import optax
import pytest

from configs import common
from sret_jax.parallel.mesh import make_mesh
from sret_jax.training.experiment import build_computation
from sret_jax.training.hyperparameters import ema_rate, make_hyperparameters, make_schedule


def test_the_rate_warms_up_from_1e_6_and_follows_a_cosine_to_1e_5():
    optim = common.get_config().optim
    schedule = make_schedule(optim, batch_size=1024, steps_per_epoch=100.5, total_steps=30150)
    peak = 5e-4 * 1024 / 512
    assert schedule(0) == pytest.approx(1e-6, rel=1e-4)
    assert schedule(251) == pytest.approx((1e-6 + peak) / 2, rel=0.01)
    assert schedule(502) == pytest.approx(peak)
    middle = 502 + (30150 - 502) // 2
    assert schedule(middle) == pytest.approx((peak + 1e-5) / 2, rel=1e-3)
    assert schedule(30150) == pytest.approx(1e-5, rel=1e-4)


def test_the_long_warm_up_is_one_word():
    optim = common.get_config("sret_long_warmup").optim
    schedule = make_schedule(optim, batch_size=512, steps_per_epoch=10, total_steps=3000)
    assert schedule(300) == pytest.approx(1e-3)


@pytest.mark.parametrize("warmup_epochs", [0.0, 3.0])
def test_the_schedule_is_optax_s(warmup_epochs):
    optim = common.get_config().optim
    optim.warmup_epochs = warmup_epochs
    steps = np.arange(130)
    ours = make_schedule(optim, batch_size=512, steps_per_epoch=10, total_steps=120)
    warmup = round(10 * warmup_epochs)
    first = optim.warmup_lr if warmup else 5e-4
    theirs = optax.warmup_cosine_decay_schedule(first, 5e-4, warmup, 120, optim.min_lr)
    np.testing.assert_allclose(ours(steps), jax.vmap(theirs)(steps), rtol=1e-3)


def test_the_average_s_decay_warms_up_where_that_is_on():
    config = common.get_config()
    numbers = make_hyperparameters(config, steps_per_epoch=10, total_steps=100)
    for step, decay in ((0, 0.1), (90, 0.91), (10**6, 0.99996)):
        assert 1 - numbers.ema_rate_at(step) == pytest.approx(decay, rel=1e-6)
    config.ema_warmup = False
    numbers = make_hyperparameters(config, steps_per_epoch=10, total_steps=100)
    assert numbers.ema_rate_at(0) == pytest.approx(4e-5, rel=1e-4)


@pytest.mark.parametrize(
    ("batch_size", "decay"), [(1024, 0.99996), (256, 0.99999), (4096, 0.99984)]
)
def test_the_average_looks_back_over_as_many_images_at_any_batch_size(batch_size, decay):
    config = common.get_config()
    config.batch_size = batch_size
    assert ema_rate(config) == pytest.approx(1 - decay, rel=1e-4)
    config.ema_decay = 0.999
    assert ema_rate(config) == 1 - 0.999


def test_runs_that_differ_in_hyperparameters_alone_share_one_program(tiny_config):
    def program():
        sizes = dict(images=1438, train_classes=10, classes=10)
        computation = build_computation(tiny_config, make_mesh(), **sizes)
        return computation.trace_train_step().lower().as_text()

    expected = program()
    tiny_config.update(epochs=3.0, seed=1, ema_decay=0.5, ema_warmup=False)
    tiny_config.optim.update(
        lr_per_512=1e-3, warmup_epochs=0.0, warmup_lr=1e-5, min_lr=0.0, weight_decay=0.0
    )
    assert program() == expected
