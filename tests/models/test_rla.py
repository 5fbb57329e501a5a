"""The residual latent action autoencoder: what each part reads and writes, its starting point, and PyTorch parity."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlawm_jax.models.rla import RLA, TokenTransformer
from tests.tiny_models import exact_products, initialised, random_module, run

B, L, C, K, D = 2, 5, 6, 3, 2
OFFICIAL = {
    "token_width": C,
    "num_tokens": K,
    "token_dim": D,
    "width": 8,
    "depth": 1,
    "heads": 2,
    "mlp_ratio": 2.0,
    "input_mode": "sub",
    "decoder_output": "absolute",
    "decoder_only": False,
    "variational": False,
    "remat": "none",
    "dtype": jnp.float32,
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def rla(**overrides) -> RLA:
    """Random weights; the same ones wherever the shapes are the same."""
    return random_module(lambda rngs: RLA(**{**OFFICIAL, **overrides}, rngs=rngs), std=0.3)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


S0, S1, Z = draw(B, L, C), draw(B, L, C, seed=1), draw(B, K, D, seed=2)


def gradients(module: RLA, method: str, *args: np.ndarray) -> list[np.ndarray]:
    """d(weighted sum of the first sample's outputs) / d(each argument)."""
    graphdef, state = nnx.split(module)

    def scalar(state, args):
        out = getattr(nnx.merge(graphdef, state), method)(*args)
        return (out[0] * jnp.arange(1.0, out[0].size + 1).reshape(out[0].shape)).sum()

    return [np.asarray(g) for g in jax.jit(jax.grad(scalar, argnums=1))(state, args)]


@pytest.mark.parametrize(("mode", "width", "positions"), [("sub", C, L), ("concat", 2 * C, L), ("append", C, 2 * L)])
def test_encoder_reads_both_frames_as_its_input_mode_says(mode, width, positions):
    module = rla(input_mode=mode)
    assert module.encoder.input_layer.kernel.shape == (width, 8)
    inputs = {
        "sub": S1 - S0,
        "concat": np.concatenate([S0, S1], axis=2),
        "append": np.concatenate([S0, S1], axis=1),
    }[mode]
    outputs = run(module.encoder, inputs)
    assert outputs.shape == (B, K + positions, D)
    np.testing.assert_allclose(run(module, S0, S1, method="encode"), outputs[:, :K], **CLOSE)
    for grad in gradients(module, "encode", S0, S1):
        assert np.all(grad[0])
        assert not np.any(grad[1])


def test_only_the_difference_reaches_a_sub_encoder():
    def shifted(mode):
        return [run(rla(input_mode=mode), S0 + c, S1 + c, method="encode") for c in (0.0, 1.0)]

    np.testing.assert_allclose(*shifted("sub"), rtol=0, atol=1e-4)
    for mode in ("concat", "append"):
        plain, moved = shifted(mode)
        assert np.abs(plain - moved).max() > 1e-2


def test_decoder_reads_the_first_frame_and_the_latent():
    on_s0, on_z = gradients(rla(), "decode", S0, Z)
    assert np.all(on_s0[0])
    assert np.all(on_z[0])
    assert not np.any(on_s0[1])
    assert not np.any(on_z[1])


def test_decoder_only_ignores_the_latent():
    on_s0, on_z = gradients(rla(decoder_only=True), "decode", S0, Z)
    assert np.all(on_s0[0])
    assert not np.any(on_z)


def test_latent_is_projected_and_added_to_the_decoders_own_tokens_in_front_of_the_patches():
    decoder = rla().decoder
    with_z = run(decoder, S0[:1], Z[:1])
    moved = nnx.clone(decoder)
    moved.tokens[...] = moved.tokens[...] + Z[0] @ moved.token_proj.kernel[...] + moved.token_proj.bias[...]
    np.testing.assert_allclose(with_z, run(moved, S0[:1]), **CLOSE)
    np.testing.assert_allclose(run(rla(), S0[:1], Z[:1], method="decode"), with_z[:, K:], **CLOSE)


def test_residual_output_is_the_first_frame_plus_the_absolute_output():
    absolute, residual = (run(rla(decoder_output=kind), S0, Z, method="decode") for kind in ("absolute", "residual"))
    np.testing.assert_allclose(residual, S0 + absolute, **CLOSE)


def test_patches_carry_no_position():
    order = np.asarray([3, 0, 4, 1, 2])
    module = rla()
    latent = run(module, S0, S1, method="encode")
    np.testing.assert_allclose(run(module, S0[:, order], S1[:, order], method="encode"), latent, **CLOSE)
    decoded = run(module, S0, Z, method="decode")
    np.testing.assert_allclose(run(module, S0[:, order], Z, method="decode"), decoded[:, order], **CLOSE)


def test_variational_head_gives_mean_then_log_variance_and_encodes_to_the_mean():
    module = rla(variational=True)
    mean, log_var = run(module, S0, S1, method="posterior")
    outputs = run(module.encoder, S1 - S0)[:, :K]
    assert outputs.shape == (B, K, 2 * D)
    np.testing.assert_allclose(np.concatenate([mean, log_var], axis=-1), outputs, **CLOSE)
    np.testing.assert_allclose(run(module, S0, S1, method="encode"), mean, **CLOSE)
    assert run(rla(), S0, S1, method="posterior")[1] is None


def test_fresh_decoder_predicts_zero_or_no_change_and_the_encoder_does_not_start_at_zero():
    fresh = initialised(lambda rngs: RLA(**OFFICIAL, rngs=rngs))
    assert not np.any(run(fresh, S0, Z, method="decode"))
    assert np.all(run(fresh, S0, S1, method="encode"))
    unchanged = nnx.merge(nnx.graphdef(rla(decoder_output="residual")), nnx.state(fresh))
    np.testing.assert_array_equal(run(unchanged, S0, Z, method="decode"), S0)
    for part in (fresh.encoder, fresh.decoder):
        kernel = np.asarray(part.blocks.blocks.mlp.up.kernel[...])
        bound = (6 / (8 + 16)) ** 0.5
        assert 0.9 * bound < np.abs(kernel).max() <= bound
        assert not np.any(part.input_layer.bias[...])
        assert float(part.tokens[...].std()) == pytest.approx(0.2, rel=0.35)  # 24 draws: 3 sigma


def test_bfloat16_compute_stays_close_to_float32_and_outputs_are_float32():
    exact, rough = rla(), rla(dtype=jnp.bfloat16)
    for method, args in (("encode", (S0, S1)), ("decode", (S0, Z))):
        a, b = run(exact, *args, method=method), run(rough, *args, method=method)
        assert b.dtype == jnp.float32
        # about ten roundings to 8 bits (0.4 % each) of numbers as large as the output, adding up at worst
        error = np.abs(a - b).max() / np.abs(a).max()
        assert 0 < error < 0.04


def test_latents_and_outputs_are_exact_around_bfloat16_blocks():
    module = rla(dtype=jnp.bfloat16)
    # the output; the decoder also projects the latent. Others: the inputs' projection and those of a block
    assert exact_products(module, S0, S1, method="encode") == (1, 9)
    assert exact_products(module, S0, Z, method="decode") == (2, 9)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"input_mode": "diff"}, "config.rla.input_mode: expected one of sub, concat, append, found 'diff'"),
        ({"decoder_output": "delta"}, "config.rla.decoder_output: expected one of absolute, residual, found 'delta'"),
    ],
)
def test_unknown_choices_are_refused_by_the_name_of_their_key(overrides, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        rla(**overrides)


# depth 2 is unrolled, depth 5 a loop
@pytest.mark.torch
@pytest.mark.parametrize(("part", "depth"), [("encoder", 5), ("decoder", 2)])
def test_token_transformer_equals_pytorch(part, depth):
    torch = pytest.importorskip("torch")
    from rlawm_jax.convert import torch_reference
    from tests import torch_weights

    latent_dim, out_dim = (D, C) if part == "decoder" else (None, D)
    theirs = torch_reference.randomise(
        torch_reference.TokenTransformer(C, out_dim, K, 16, depth, 4, 4.0, latent_dim=latent_dim)
    )
    sizes = {"in_dim": C, "out_dim": out_dim, "num_tokens": K, "width": 16, "depth": depth, "heads": 4}
    ours = torch_weights.load(
        lambda rngs: TokenTransformer(
            **sizes, mlp_ratio=4.0, latent_dim=latent_dim, remat="none", dtype=jnp.float32, rngs=rngs
        ),
        torch_weights.token_transformer(theirs.state_dict()),
    )
    inputs = (S0, Z) if part == "decoder" else (S1 - S0,)
    expected = theirs(*map(torch.from_numpy, inputs)).detach()
    np.testing.assert_allclose(run(ours, *inputs), expected, rtol=0, atol=1e-4)
