"""The one step: any subset, each objective on its own part and in its own time, the state donated, NaN reported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlawm_jax.latent_scale import DECAY
from rlawm_jax.rng import stream
from rlawm_jax.sharding import make_mesh, replicated
from rlawm_jax.training.state import count_parameters, init_state, join_model, split_model
from rlawm_jax.training.step import (
    jit_train_step,
    make_objectives,
    make_train_step,
    make_transforms,
    token_batch,
)
from rlawm_jax.world_model import PARTS
from tests.tiny_models import IMAGE_SIZE, PER_DIMENSION, tiny_config, tiny_world, tokens

BATCH = 4
SUBSETS = [*(pytest.param((part,), marks=pytest.mark.slow) for part in PARTS), PARTS]


def only(parts, **overrides):
    """The tiny config with just these objectives."""
    enabled = {f"objectives__{part}__enabled": part in parts for part in PARTS}
    return tiny_config(train__steps=10, optimizer__learning_rate=1e-3, **enabled | overrides)


def batch(seed: int = 0) -> dict:
    """A batch with tokens and pictures, four windows of one to four actions."""
    rng = np.random.default_rng(seed)
    return {
        "tokens": np.stack([tokens(BATCH, seed), tokens(BATCH, seed + 100)], axis=1),
        "frames": rng.integers(0, 256, (BATCH, 2, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
        "actions": rng.normal(size=(BATCH, 5, 3)).astype(np.float32),
        "num_actions": np.arange(1, BATCH + 1, dtype=np.int32),
        "robot_id": np.array([0, 2, 0, 2], np.int32),
    }


class Program:
    """A config's step, jitted on one device, and the state that every program here starts from."""

    def __init__(self, config, *, running: bool = False, **model_settings):
        objectives = make_objectives(config)
        transforms = make_transforms(config, objectives)
        model = tiny_world(**model_settings)
        graphdef, params, self.frozen = split_model(model, list(objectives))
        state = init_state(params, transforms, model.latent_scale[...])
        self.traces = 0
        step = make_train_step(graphdef, objectives, transforms, seed=config.seed, running_latent_scale=running)

        @functools.wraps(step)
        def counted(*args):
            self.traces += 1
            return step(*args)

        mesh = make_mesh(1, 1, 1, jax.devices()[:1])
        self.step = jit_train_step(counted, state, self.frozen, mesh, list(batch()))
        self.place = replicated(mesh)
        self.initial = jax.tree.map(np.asarray, state)

    def __call__(self, *, at: int = 0, data: dict | None = None, state=None):
        """(state, metrics) one step after `state`, or after the initial one put at step `at`."""
        if state is None:
            state = self.initial._replace(step=np.int32(at))
        return self.step(jax.device_put(state, self.place), self.frozen, data or batch())


@functools.cache
def program(parts, **overrides) -> Program:
    return Program(only(parts, **overrides), running=parts == ("rla",))


@functools.cache
def windowed() -> Program:
    """Joint, with the image decoder before step 2, the denoiser from step 2, the RLA from step 1 to 3."""
    windows = {"image_decoder": (0, 2), "denoiser": (2, 0), "rla": (1, 3)}
    overrides = {f"objectives__{part}__start_step": start for part, (start, _) in windows.items()}
    overrides |= {f"objectives__{part}__stop_step": stop for part, (_, stop) in windows.items()}
    return Program(only(PARTS, optimizer__warmup_steps=2, **overrides), running=True)


def changed(before, after) -> bool:
    return any(
        np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
    )


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_a_step_trains_the_enabled_parts_and_reports_them(parts):
    start = program(parts)
    state, metrics = start()
    assert state.step == 1
    assert set(state.params) == set(state.opt_state) == set(parts)
    for part in parts:
        assert changed(start.initial.params[part], state.params[part])
        assert metrics[f"{part}/loss"] > 0 and metrics[f"{part}/grad_norm"] > 0 and metrics[f"{part}/finite"] == 1
        norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(state.params[part])))
        np.testing.assert_allclose(metrics[f"{part}/param_norm"], norm, rtol=1e-5)
    assert {name.split("/")[0] for name in metrics} == {*parts, "latent_scale"}
    assert all(value.dtype == jnp.float32 for value in metrics.values())


@pytest.mark.parametrize("part", PARTS)
def test_staged_equals_joint(part):
    joint, joint_metrics = program(PARTS)()
    alone, alone_metrics = program((part,))()
    # the same arithmetic in two programs: XLA may fuse it differently, which moves the last bits of a gradient, and
    # Adam turns a gradient of rounding noise (of a key's bias, say) into a fraction of the learning rate of 1e-3
    for name in (name for name in alone_metrics if name.startswith(part)):
        np.testing.assert_allclose(joint_metrics[name], alone_metrics[name], rtol=1e-5, err_msg=name)
    for left, right in zip(*(jax.tree.leaves(s.opt_state[part]) for s in (joint, alone)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-7)
    for left, right in zip(*(jax.tree.leaves(s.params[part]) for s in (joint, alone)), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_an_objective_outside_its_steps_changes_nothing_and_reports_zeros():
    active = {0: {"image_decoder"}, 1: {"image_decoder", "rla"}, 2: {"rla", "denoiser"}, 3: {"denoiser"}}
    start = windowed()
    for at, parts in active.items():
        state, metrics = start(at=at)
        for part in PARTS:
            trees = (
                (start.initial.params[part], start.initial.opt_state[part]),
                (state.params[part], state.opt_state[part]),
            )
            assert changed(*trees) == (part in parts), (at, part)
            own = {k: float(v) for k, v in metrics.items() if k.startswith(part) and not k.endswith("/finite")}
            assert (own[f"{part}/loss"] > 0) == (part in parts)
            if part not in parts:
                assert set(own.values()) == {0.0}
                assert metrics[f"{part}/finite"] == 1
        assert (metrics["latent_scale"] != start.initial.latent_scale) == ("rla" in parts)


@pytest.mark.slow
def test_a_schedule_counts_the_steps_of_its_own_objective():
    start = windowed()
    # with a warm-up of two steps, the first update of any objective has learning rate 0: its moments move, it does not
    for at, part in ((0, "image_decoder"), (1, "rla"), (2, "denoiser")):
        state, _ = start(at=at)
        assert not changed(start.initial.params[part], state.params[part])
        assert changed(start.initial.opt_state[part], state.opt_state[part])
        state, _ = start(state=state._replace(step=jnp.int32(at)))
        assert changed(start.initial.params[part], state.params[part])
    assert start.traces == 1


def test_the_state_is_donated_and_frozen_weights_are_neither_donated_nor_changed():
    start = program(("rla",))
    frozen = jax.tree.map(np.array, start.frozen)
    state = jax.device_put(start.initial, start.place)
    start.step(state, start.frozen, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(start.frozen))
    assert not changed(frozen, start.frozen)
    assert count_parameters(start.frozen) > count_parameters(state.params)  # the other parts are among them


@pytest.mark.parametrize("parts", [("rla",), PARTS], ids="+".join)
def test_not_a_number_in_the_batch_is_flagged_for_each_part(parts):
    data = batch()
    data["tokens"][0, 0, 0, 0] = np.nan
    _, metrics = program(parts)(data=data)
    assert [float(metrics[f"{part}/finite"]) for part in parts] == [0.0] * len(parts)
    _, metrics = program(parts)()
    assert [float(metrics[f"{part}/finite"]) for part in parts] == [1.0] * len(parts)


def test_the_running_latent_scale_averages_the_latents_deviation_and_forgets_its_start():
    start = program(("rla",))
    state, measured = start.initial, []
    for seed in range(5):
        state, metrics = start(state=state, data=batch(seed))
        measured.append(float(metrics["rla/z_std"]))
        np.testing.assert_allclose(state.latent_scale, np.mean(measured), rtol=1e-6)
        assert metrics["latent_scale"] == state.latent_scale
    assert len(set(measured)) == 5
    late, metrics = start(at=5000)
    expected = DECAY * start.initial.latent_scale + (1 - DECAY) * metrics["rla/z_std"]
    np.testing.assert_allclose(late.latent_scale, expected, rtol=1e-6)
    assert start.traces == 1


def test_without_running_the_latent_scale_stays():
    state, metrics = program(PARTS)()
    assert state.latent_scale == metrics["latent_scale"] == program(PARTS).initial.latent_scale


def test_means_and_deviations_per_dimension_follow_the_latents_and_are_not_logged():
    start = Program(only(PARTS, **PER_DIMENSION, objectives__rla__stop_step=3), running=True, **PER_DIMENSION)
    model, data = tiny_world(**PER_DIMENSION), batch()
    z = model.rla.encode(*jnp.unstack(jnp.asarray(data["tokens"]), axis=1))
    state, metrics = start()
    # means and deviations of four windows, number by number
    np.testing.assert_allclose(state.latent_scale, jnp.stack([z.mean(0), z.std(0)]), rtol=1e-3, atol=1e-5)
    assert all(value.shape == () for value in metrics.values())
    np.testing.assert_allclose(metrics["latent_scale"], jnp.sqrt((z.std(0) ** 2).mean()), rtol=1e-3)
    rested, _ = start(at=3)
    np.testing.assert_array_equal(rested.latent_scale, start.initial.latent_scale)
    assert start.traces == 1


def test_noise_is_drawn_anew_at_each_step_and_again_at_the_same_step():
    losses = [float(program(("denoiser",))(at=at)[1]["denoiser/loss"]) for at in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_targets_of_the_image_decoder_are_the_frames_between_zero_and_one():
    model, data = tiny_world(), batch()
    found = token_batch(model, {name: jnp.asarray(value) for name, value in data.items()})
    np.testing.assert_allclose(found.images, data["frames"] / 255.0, atol=1e-6)
    np.testing.assert_array_equal(found.s0, data["tokens"][:, 0])
    np.testing.assert_array_equal(found.s1, data["tokens"][:, 1])


def descent(accumulate: int, parts, running: bool = False):
    """Parameters and metrics after a step of plain gradient descent at rate 1."""
    config = only(parts, train__accumulate=accumulate)
    objectives = make_objectives(config)
    graphdef, params, frozen = split_model(tiny_world(), list(objectives))
    transforms = dict.fromkeys(objectives, optax.sgd(1.0))
    state = init_state(params, transforms, jnp.float32(10.0))
    step = make_train_step(
        graphdef, objectives, transforms, seed=0, running_latent_scale=running, accumulate=accumulate
    )
    return *jax.jit(step)(state, frozen, batch()), (graphdef, objectives, state, frozen)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch():
    parts = ("image_decoder", "rla")  # of which no noise is drawn
    (whole, whole_metrics, _), (found, metrics, _) = descent(1, parts, True), descent(2, parts, True)
    for left, right in zip(jax.tree.leaves(found.params), jax.tree.leaves(whole.params), strict=True):
        # sums of float32 in another order
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)
    for name, value in whole_metrics.items():
        # a deviation over half a batch is not that over the whole; everything else is a mean
        near = {"rtol": 0.05} if name in ("rla/z_std", "latent_scale") else {"rtol": 1e-4}
        np.testing.assert_allclose(metrics[name], value, **near, err_msg=name)


@pytest.mark.slow
def test_accumulated_gradients_are_means_over_micro_batches_with_noise_of_their_own():
    found, metrics, (graphdef, objectives, state, frozen) = descent(2, ("denoiser",))
    key = stream(jax.random.key(0), "denoiser", 0)

    @jax.jit
    def gradient(params, rows, i):
        def loss(own):
            model = join_model(graphdef, {"denoiser": own}, frozen, state.latent_scale)
            return objectives["denoiser"].loss(model, token_batch(model, rows), stream(key, "micro_batch", i))[0]

        return jax.value_and_grad(loss)(params)

    halves = [gradient(state.params["denoiser"], {k: v[i::2] for k, v in batch().items()}, i) for i in range(2)]
    losses, grads = zip(*halves, strict=True)
    assert losses[0] != losses[1]
    np.testing.assert_allclose(metrics["denoiser/loss"], np.mean(losses), rtol=1e-5)
    expected = jax.tree.map(lambda p, a, b: p - (a + b) / 2, state.params["denoiser"], *grads)
    for left, right in zip(jax.tree.leaves(found.params["denoiser"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_tokens_of_both_frames_come_from_one_pass_in_their_order():
    model, data = tiny_world(backbone=True), {k: jnp.asarray(v) for k, v in batch().items() if k != "tokens"}
    found = token_batch(model, data)
    for frame, tokens_found in ((0, found.s0), (1, found.s1)):
        np.testing.assert_allclose(tokens_found, model.encode(data["frames"][:, frame]), rtol=1e-4, atol=1e-4)


def test_objectives_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"config\.objectives: expected at least one of .* found none"):
        make_objectives(only(()))
    with pytest.raises(
        ValueError, match=r"config\.objectives\.rla: expected 0 <= start_step < stop_step .*start_step=5"
    ):
        make_objectives(only(("rla",), objectives__rla__start_step=5, objectives__rla__stop_step=5))
    with pytest.raises(ValueError, match=r"config\.objectives\.denoiser: .*start_step=10, stop=10"):
        make_objectives(only(("denoiser",), objectives__denoiser__start_step=10))
