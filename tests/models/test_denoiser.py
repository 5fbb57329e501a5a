"""The denoiser: who reads which actions, what the flow stage knows of the condition, its start, and PyTorch parity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlawm_jax.models.denoiser import ActionEncoder, ConditionBlock, Denoiser, FlowBlock
from rlawm_jax.models.layers import layer_norm
from tests import numpy_reference as reference
from tests.tiny_models import exact_products, random_module, run

B, L, C, K, D, WIDTH, MAX_HORIZON = 3, 5, 6, 4, 2, 8, 4
OFFICIAL = {
    "token_width": C,
    "num_tokens": K,
    "token_dim": D,
    "action_dims": {0: 2, 2: 3},
    "max_horizon": MAX_HORIZON,
    "width": WIDTH,
    "cond_depth": 1,
    "flow_depth": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "token_embedding": False,
    "action_in_flow": False,
    "remat": "none",
    "dtype": jnp.float32,
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PARITY = {"rtol": 0, "atol": 1e-4}


def make(**overrides):
    return lambda rngs: Denoiser(**OFFICIAL | overrides, rngs=rngs)


@functools.cache
def denoiser(**overrides) -> Denoiser:
    return random_module(make(**overrides), std=0.3)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


TOKENS, NOISY = draw(B, L, C), draw(B, K, D, seed=1)
TIMES = np.asarray([0.1, 0.5, 0.9], np.float32)
# six rows, two more than max_horizon; one short window, one full, one claiming more rows than are kept
ACTIONS, COUNTS, ROBOTS = draw(B, 6, 3, seed=2), np.asarray([1, 4, 6]), np.asarray([0, 2, 2])


def condition(module: Denoiser, **changes):
    inputs = {"tokens": TOKENS, "actions": ACTIONS, "num_actions": COUNTS, "robot_id": ROBOTS} | changes
    return run(module, *inputs.values(), method="condition")


def velocity(module: Denoiser, noisy=NOISY, **changes):
    return run(module, noisy, TIMES, condition(module, **changes), method="velocity")


def test_action_encoder_normalises_rows_and_keeps_the_last_valid_hidden_state():
    encoder = random_module(lambda rngs: ActionEncoder(2, WIDTH, rngs=rngs), std=0.3)
    encoder.scale[...], encoder.offset[...] = jnp.asarray([0.5, 2.0]), jnp.asarray([-1.0, 0.25])
    vectors = run(encoder, ACTIONS, COUNTS)
    for ours, rows, count in zip(vectors, ACTIONS, COUNTS, strict=True):
        normalised = rows[:, :2] * [0.5, 2.0] + [-1.0, 0.25]
        np.testing.assert_allclose(ours, reference.gru(encoder.gru, reference.mlp(encoder, normalised), count), **CLOSE)


def test_velocity_reads_only_valid_rows_within_the_horizon_and_the_robots_own_columns():
    module = denoiser()
    graphdef, state = nnx.split(module)

    def scalar(actions):
        model = nnx.merge(graphdef, state)
        own = model.condition(jnp.asarray(TOKENS), actions, jnp.asarray(COUNTS), jnp.asarray(ROBOTS))
        return jnp.square(model.velocity(jnp.asarray(NOISY), jnp.asarray(TIMES), own)).sum()

    read = np.asarray(jax.jit(jax.grad(scalar))(ACTIONS)) != 0
    expected = np.zeros_like(read)
    for i, (count, width) in enumerate(zip(COUNTS, [2, 3, 3], strict=True)):
        expected[i, : min(count, MAX_HORIZON), :width] = True
    np.testing.assert_array_equal(read, expected)


def test_each_robots_encoder_learns_from_its_own_samples_only():
    graphdef, params, rest = nnx.split(denoiser(), nnx.Param, ...)

    def scalar(params, robots):
        model = nnx.merge(graphdef, params, rest)
        vectors = model.encode_actions(jnp.asarray(ACTIONS), jnp.asarray(COUNTS), robots)
        return jnp.square(vectors).sum()

    gradient = jax.jit(jax.grad(scalar))
    for robots, learning in (([0, 0, 0], {"0"}), ([2, -1, 2], {"2"}), ([-1, -1, -1], set()), ([2, 0, 0], {"0", "2"})):
        grads = nnx.to_flat_state(gradient(params, jnp.asarray(robots)))
        assert {path[1] for path, leaf in grads if np.any(leaf.get_value())} == learning


def test_robot_minus_one_has_the_zero_action_vector():
    vectors = run(denoiser(), ACTIONS, COUNTS, np.asarray([-1, 2, -1]), method="encode_actions")
    assert np.any(vectors, axis=1).tolist() == [False, True, False]


def test_actions_are_encoded_in_float32_under_bfloat16_compute():
    args = (ACTIONS + 3.0, COUNTS, ROBOTS)
    exact, rough = (run(denoiser(dtype=t), *args, method="encode_actions") for t in (jnp.float32, jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rough, exact.astype(jnp.bfloat16))


def test_every_product_of_the_action_encoder_asks_for_full_precision():
    encoder = random_module(lambda rngs: ActionEncoder(2, WIDTH, rngs=rngs))
    # two linears, and the GRU's rows and hidden state
    assert exact_products(encoder, ACTIONS, COUNTS) == (4, 0)


def test_latents_time_and_velocity_are_exact_around_bfloat16_flow_blocks():
    module = denoiser(dtype=jnp.bfloat16)
    own = jax.eval_shape(lambda: module.condition(TOKENS, ACTIONS, COUNTS, ROBOTS))
    exact, rounded = exact_products(module, NOISY, TIMES, own, method="velocity")
    assert exact == 4 and rounded > 0  # latent_in, two of the time embedding, out_layer


def test_condition_block_is_adaln_with_a_linear_before_silu():
    block = random_module(lambda rngs: ConditionBlock(WIDTH, 2, 2.0, dtype=jnp.float32, rngs=rngs), std=0.3)
    x, vec = draw(1, L, WIDTH), draw(1, WIDTH, seed=1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = reference.modulation(
        block.modulation, reference.affine(block, "cond_proj", vec[0])
    )
    h = x[0].astype(np.float64)
    y = reference.standardised(h) * (1 + scale_a) + shift_a
    h = h + gate_a * reference.attention(block.attn, y, y)
    h = h + gate_m * reference.mlp(block.mlp, reference.standardised(h) * (1 + scale_m) + shift_m)
    np.testing.assert_allclose(run(block, x, vec)[0], h, **CLOSE)


def test_flow_block_is_modulated_attention_then_plain_cross_attention_then_modulated_mlp():
    block = random_module(lambda rngs: FlowBlock(WIDTH, 2, 2.0, dtype=jnp.float32, rngs=rngs), std=0.3)
    x, vec, cond = draw(1, K, WIDTH), draw(1, WIDTH, seed=1), draw(1, L, WIDTH, seed=2)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = reference.modulation(block.modulation, vec[0])
    h = x[0].astype(np.float64)
    y = reference.standardised(h) * (1 + scale_a) + shift_a
    h = h + gate_a * reference.attention(block.self_attn, y, y)
    y = reference.standardised(h) * reference.leaf(block, "cross_norm.scale") + reference.leaf(block, "cross_norm.bias")
    h = h + reference.attention(block.cross_attn, y, cond[0])
    h = h + gate_m * reference.mlp(block.mlp, reference.standardised(h) * (1 + scale_m) + shift_m)
    keys_values = run(block, cond, method="keys_values")
    np.testing.assert_allclose(run(block, x, vec, keys_values)[0], h, **CLOSE)


def blocks(stack):
    graphdef, state = nnx.split(stack.blocks)
    return [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(stack.depth)]


@functools.partial(jax.jit, static_argnums=0)
def velocity_recomputed(graphdef, state, noisy, times, action_vec):
    """The whole forward pass at one ODE step, nothing kept between steps: condition, then keys and values per block."""
    model = nnx.merge(graphdef, state)
    cond = model.token_in(TOKENS)
    for block in blocks(model.cond_blocks):
        cond = block(cond, action_vec)
    h, vec = model.latent_in(noisy), model.time_embedding(times)
    for block in blocks(model.flow_blocks):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (m[:, None] for m in block.modulation(vec))
        h = h + gate_a * block.self_attn(layer_norm(h) * (1 + scale_a) + shift_a)
        h = h + block.cross_attn.attend(block.cross_norm(h), block.cross_attn.keys_values(cond))
        h = h + gate_m * block.mlp(layer_norm(h) * (1 + scale_m) + shift_m)
    return model.out_layer(model.norm_out(h))


def test_keys_and_values_computed_once_equal_recomputing_them_at_every_step():
    module = denoiser()
    once, split = condition(module), nnx.split(module)
    ours = theirs = NOISY
    for i in range(3):
        times = np.full(B, 1 - i / 3, np.float32)
        ours = ours - run(module, ours, times, once, method="velocity") / 3
        theirs = theirs - velocity_recomputed(*split, theirs, times, once.action_vec) / 3
    # the same operations, fused in another order
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_velocity_treats_noisy_tokens_as_a_set_unless_they_carry_an_index():
    order = np.asarray([2, 0, 3, 1])
    plain = denoiser()
    np.testing.assert_allclose(velocity(plain, NOISY[:, order]), velocity(plain)[:, order], **CLOSE)
    indexed = denoiser(token_embedding=True)
    assert np.abs(velocity(indexed, NOISY[:, order]) - velocity(indexed)[:, order]).max() > 1e-2


def test_patch_tokens_of_the_condition_are_a_set():
    order = np.asarray([4, 2, 0, 1, 3])
    np.testing.assert_allclose(velocity(denoiser(), tokens=TOKENS[:, order]), velocity(denoiser()), **CLOSE)


@pytest.mark.parametrize("extension", [False, True])
def test_action_vector_enters_the_flow_blocks_only_with_the_extension(extension):
    module = denoiser(action_in_flow=extension)
    given = condition(module)
    moved = given._replace(action_vec=given.action_vec + 1.0)
    changed = run(module, NOISY, TIMES, given, method="velocity") != run(module, NOISY, TIMES, moved, method="velocity")
    assert np.any(changed) == extension


def test_fresh_velocity_is_zero_and_fresh_condition_blocks_change_nothing():
    def initial(rngs: nnx.Rngs):
        module = make()(rngs)
        return nnx.state(module.out_layer), nnx.state(module.cond_blocks.blocks.modulation)

    # random weights everywhere but in the two layers that start at zero: compiling all initialisers takes longer
    module = nnx.clone(denoiser())
    out_layer, modulation = jax.jit(lambda: initial(nnx.Rngs(0)))()
    nnx.update(module.out_layer, out_layer)
    nnx.update(module.cond_blocks.blocks.modulation, modulation)
    assert not np.any(velocity(module))
    unconditioned = run(module.token_in, TOKENS)
    for block, keys in zip(blocks(module.flow_blocks), condition(module).keys_values[0], strict=True):
        np.testing.assert_allclose(keys.reshape(B, L, WIDTH), run(block.cross_attn.key, unconditioned), **CLOSE)


def test_token_projection_exists_only_where_widths_differ():
    assert nnx.eval_shape(lambda: make(token_width=WIDTH)(nnx.Rngs(0))).token_in is None
    assert denoiser().token_in.kernel.shape == (C, WIDTH)


def test_bfloat16_compute_stays_close_to_float32_and_velocity_is_float32():
    exact, rough = velocity(denoiser()), velocity(denoiser(dtype=jnp.bfloat16))
    assert rough.dtype == jnp.float32
    # some fifteen roundings to 8 bits (0.4 % each) of numbers as large as the output, adding up at worst
    assert 0 < np.abs(exact - rough).max() / np.abs(exact).max() < 0.06


@pytest.mark.torch
class TestTorchParity:
    """float32, random weights, unit-scale inputs; 1e-4 is the issue's bound."""

    @pytest.mark.parametrize("kind", ["condition", "flow"])
    def test_blocks(self, kind):
        torch = pytest.importorskip("torch")
        from rlawm_jax.convert import torch_reference
        from tests import torch_weights

        theirs_type, ours_type, convert = {
            "condition": (torch_reference.ConditionBlock, ConditionBlock, torch_weights.condition_block),
            "flow": (torch_reference.FlowBlock, FlowBlock, torch_weights.flow_block),
        }[kind]
        theirs = torch_reference.randomise(theirs_type(16, 4, 4.0))
        ours = torch_weights.load(
            lambda rngs: ours_type(16, 4, 4.0, dtype=jnp.float32, rngs=rngs), convert(theirs.state_dict())
        )
        x, vec, cond = draw(2, L, 16), draw(2, 16, seed=1), draw(2, 7, 16, seed=2)
        if kind == "condition":
            expected, got = theirs(torch.from_numpy(x), torch.from_numpy(vec)), run(ours, x, vec)
        else:
            expected = theirs(*map(torch.from_numpy, (x, vec, cond)))
            got = run(ours, x, vec, run(ours, cond, method="keys_values"))
        np.testing.assert_allclose(got, expected.detach(), **PARITY)

    # depths 2 are unrolled, 5 a loop; the official token width equals the model's, others pass a linear
    @pytest.mark.parametrize(("token_width", "depth"), [(C, 2), (16, 5)])
    def test_whole_denoiser(self, token_width, depth):
        torch = pytest.importorskip("torch")
        from rlawm_jax.convert import torch_reference
        from tests import torch_weights

        theirs = torch_reference.randomise(
            torch_reference.FlowModel(token_width, D, {0: 2, 2: 3}, 16, depth, depth, 4, 2.0, max_horizon=MAX_HORIZON),
            std=0.1,
        )
        ours = torch_weights.load(
            make(token_width=token_width, width=16, cond_depth=depth, flow_depth=depth, heads=4),
            torch_weights.denoiser(theirs.state_dict()),
        )
        tokens = draw(B, L, token_width)
        actions, counts, robots, noisy, times = map(torch.from_numpy, (ACTIONS, COUNTS, ROBOTS, NOISY, TIMES))
        with torch.no_grad():
            vec = theirs.action_vec(actions, counts, robots)
            expected = theirs.velocity(noisy, times, theirs.condition(torch.from_numpy(tokens), vec))
        given = condition(ours, tokens=tokens)
        np.testing.assert_allclose(given.action_vec, vec, **PARITY)
        np.testing.assert_allclose(run(ours, NOISY, TIMES, given, method="velocity"), expected, **PARITY)
