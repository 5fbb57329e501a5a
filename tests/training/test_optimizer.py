"""Schedules over an objective's own steps, the update rules by name, and what is refused."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from rlawm_jax.training.optimizer import kernel_axes, make_optimizer, make_schedule


def settings(**overrides):
    """The optimizer section of the official recipe, at learning rate 1e-2."""
    config = base.get_config().optimizer
    config.update({"learning_rate": 1e-2} | overrides)
    return config.lock()


def test_the_official_schedule_is_constant():
    schedule = make_schedule(base.get_config().optimizer, 0, 100_000)
    assert {float(schedule(step)) for step in (0, 1, 99_999)} == {1e-4}


def test_warm_up_rises_from_zero_and_cosine_ends_at_zero_after_the_objectives_own_steps():
    schedule = make_schedule(settings(warmup_steps=4, decay="cosine"), 1000, 1020)
    np.testing.assert_allclose([schedule(step) for step in (0, 1, 2, 4)], [0, 0.25e-2, 0.5e-2, 1e-2], atol=1e-9)
    np.testing.assert_allclose([schedule(12), schedule(20)], [0.5e-2, 0], atol=1e-9)  # half of the 16 steps left: half
    constant = make_schedule(settings(warmup_steps=4), 0, 20)
    np.testing.assert_allclose([constant(2), constant(4), constant(19)], [0.5e-2, 1e-2, 1e-2], rtol=1e-6)


def first_update(config, gradient: float) -> float:
    """What a parameter of 2.0 becomes under one gradient."""
    params = {"bias": jnp.asarray([2.0])}
    optimizer = make_optimizer(config, 0, 10)
    updates, _ = optimizer.update({"bias": jnp.asarray([gradient])}, optimizer.init(params), params)
    return float(optax.apply_updates(params, updates)["bias"][0])


def test_adamw_first_update_is_the_learning_rate_against_the_sign_of_the_gradient():
    np.testing.assert_allclose(first_update(settings(), 3.0), 2.0 - 1e-2, rtol=1e-6)
    # decoupled decay: lr * wd * parameter on top
    np.testing.assert_allclose(first_update(settings(weight_decay=0.5), 3.0), 2.0 - 1e-2 - 1e-2, rtol=1e-6)


def test_what_muon_leaves_to_adamw_has_a_rate_of_its_own():
    params = {"bias": jnp.zeros(2), "kernel": jnp.eye(2)}

    def updates(adam_scale: float):
        optimizer = make_optimizer(settings(name="muon"), 0, 10, lr_scale=2.0, adam_scale=adam_scale)
        return optimizer.update(params | {"bias": jnp.ones(2)}, optimizer.init(params), params)[0]

    plain, slow = updates(1.0), updates(0.05)
    np.testing.assert_allclose(slow["bias"], 0.05 * plain["bias"], rtol=1e-5)
    np.testing.assert_array_equal(slow["kernel"], plain["kernel"])


def test_clipping_bounds_the_gradient_norm_before_the_moments():
    params, gradient = {"bias": jnp.zeros(2)}, {"bias": jnp.asarray([3.0, 4.0])}

    def moment(config):
        optimizer = make_optimizer(config, 0, 10)
        state = optimizer.update(gradient, optimizer.init(params), params)[1]
        return optax.tree.get(state, "mu")["bias"] / (1 - 0.9)

    np.testing.assert_allclose(moment(settings()), [3.0, 4.0], rtol=1e-5)
    np.testing.assert_allclose(moment(settings(clip=1.0)), [0.6, 0.8], rtol=1e-5)
    np.testing.assert_allclose(moment(settings(clip=10.0)), [3.0, 4.0], rtol=1e-5)


def test_muon_orthogonalises_kernels_of_linears_and_leaves_the_rest_to_adamw():
    params = {
        "linear": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)},
        "blocks": {"kernel": jnp.zeros((2, 4, 3))},
        "conv": {"kernel": jnp.zeros((3, 3, 4, 5))},
        "ups": {"0": {"kernel": jnp.zeros((6, 2, 2, 5))}},
        "conv_out": {"kernel": jnp.zeros((3, 3, 4, 3))},
        "tokens": jnp.zeros((5, 4)),
    }
    axes = kernel_axes(params)
    assert (axes["linear"]["kernel"].reduction_axis, axes["linear"]["kernel"].output_axis) == (0, 1)
    assert (axes["blocks"]["kernel"].reduction_axis, axes["blocks"]["kernel"].output_axis) == (1, 2)
    assert axes["linear"]["bias"] is axes["conv_out"]["kernel"] is axes["tokens"] is None
    assert (axes["conv"]["kernel"].reduction_axis, axes["conv"]["kernel"].output_axis) == ((0, 1, 2), (3,))
    assert (axes["ups"]["0"]["kernel"].reduction_axis, axes["ups"]["0"]["kernel"].output_axis) == ((0,), (1, 2, 3))
    rng = np.random.default_rng(0)
    gradient = {"kernel": jnp.asarray(rng.normal(size=(4, 4)) @ np.diag([1.0, 0.5, 0.2, 0.1]), jnp.float32)}
    optimizer = make_optimizer(settings(name="muon"), 0, 10)
    update = optimizer.update(gradient, optimizer.init(gradient), gradient)[0]["kernel"]
    # Newton-Schulz with Muon's coefficients leaves singular values between 0.68 and 1.13 of the common one, by design
    assert np.linalg.cond(update) < 1.8 < 5 < np.linalg.cond(gradient["kernel"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"name": "sgd"}, r"config\.optimizer\.name: expected one of adamw, muon, found 'sgd'"),
        ({"decay": "linear"}, r"config\.optimizer\.decay: expected one of constant, cosine, found 'linear'"),
        ({"decay": "cosine", "warmup_steps": 10}, r"config\.optimizer\.warmup_steps: expected fewer than the 10 steps"),
    ],
)
def test_settings_that_do_not_exist_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(settings(**override), 5, 15)
