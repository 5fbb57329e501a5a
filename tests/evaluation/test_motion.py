"""Motion in time, in worlds where an object walks from patch to patch and the answer is known."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlawm_jax.evaluation.motion import LATENTS, NOISE, TOKENS, TRUE, measure, scores
from rlawm_jax.evaluation.open_loop import OpenLoop
from tests.toy_world import LATENT, WIDTH, ToyLoader, ToyModel, toy_config


class Walk(ToyLoader):
    """Every episode's tokens are 1 at a single patch, the next one at every frame."""

    def __init__(self):
        super().__init__(with_frames=False)
        episodes, frames, patches, _ = self.tokens.shape
        lit = (np.arange(episodes)[:, None] + np.arange(frames)) % patches
        self.tokens = np.repeat(np.eye(patches, dtype=np.float32)[lit][..., None], WIDTH, axis=-1)


class WalkRla(nnx.Module):
    """The latent is the number of patches walked; decoding walks as far as `order` says for the rounded latent."""

    def __init__(self, order):
        self.order = order

    def encode(self, s0, s1):
        at = [tokens[..., 0].argmax(axis=1) for tokens in (s0, s1)]
        return jnp.broadcast_to(((at[1] - at[0]) % 16)[:, None, None].astype(jnp.float32), (len(s0), *LATENT))

    def decode(self, s0, z):
        number = jnp.clip(jnp.round(z.mean(axis=(1, 2))).astype(int), 0, len(self.order) - 1)
        steps = jnp.array(self.order)[number]
        return jnp.take_along_axis(s0, (jnp.arange(16) - steps[:, None])[..., None] % 16, axis=1)


class WalkModel(ToyModel):
    """`noise_scale` times the toy's noise stands for e; at 0 a latent drawn from it stays where it is."""

    def __init__(self, order=tuple(range(16)), noise_scale: float = 0.0):
        super().__init__(noise_scale)
        self.rla = WalkRla(order)

    def noise(self, key, ids):
        return self.noise_scale * super().noise(key, ids)


def motion(model, **overrides):
    return measure(OpenLoop(model, toy_config(chunk=6, horizons=(6,), **overrides), Walk(), images=False))


def values(found, path):
    return [found.scores[path][name].value for name in ("monotone", "correlation", "error")]


def test_a_decoder_that_moves_the_object_is_linear_in_time_where_a_blend_of_tokens_jumps():
    found = motion(WalkModel())
    for path in (NOISE, LATENTS, TRUE):
        np.testing.assert_allclose(values(found, path), [1, 1, 0], atol=1e-6)
    np.testing.assert_allclose([p.value for p in found.positions[LATENTS]], np.arange(1, 6) / 5)
    # of five intervals: a blend is nearest to the first frame at shares 0, 0.2 and 0.4 and to the last from 0.6 on
    jump = np.array([0, 0, 0, 5, 5, 5])
    expected = [1, np.corrcoef(jump, np.arange(6))[0, 1], (1 + 2 + 2 + 1) / 6 / 5]
    np.testing.assert_allclose(values(found, TOKENS), expected, rtol=1e-6)
    assert (found.scores[NOISE]["error"].count, found.scores[NOISE]["error"].clusters) == (12, 6)


def test_a_decoder_that_shuffles_distances_is_not():
    found = motion(WalkModel(order=(0, 4, 1, 3, 2, 5)))
    walked = np.array([0, 4, 1, 3, 2, 5])
    expected = [3 / 5, np.corrcoef(walked, np.arange(6))[0, 1], np.abs(walked - np.arange(6)).mean() / 5]
    np.testing.assert_allclose(values(found, NOISE), expected, rtol=1e-6)
    np.testing.assert_allclose(values(found, TOKENS), values(motion(WalkModel()), TOKENS))  # no decoder on that path


def test_noise_counts_on_its_path_only_and_follows_the_window():
    quiet, loud = motion(WalkModel()), motion(WalkModel(noise_scale=4.0))
    assert loud.scores[NOISE]["error"].value > 0.05
    assert loud.scores[LATENTS] == quiet.scores[LATENTS]
    assert motion(WalkModel(noise_scale=4.0), batch_size=12).scores == loud.scores
    assert motion(WalkModel(noise_scale=4.0), samples=1).scores[NOISE] != loud.scores[NOISE]


def test_scores_are_their_definitions():
    positions = np.array([[0, 3, 2], [1, 2, 2], [2, 1, 2], [3, 0, 2]])
    found = scores(positions, 0, 3)
    np.testing.assert_allclose(found["monotone"], [1, 0, 1])
    np.testing.assert_allclose(found["correlation"], [1, -1, 0])  # 0 where nothing moves
    np.testing.assert_allclose(found["error"], [0, (3 + 1 + 1 + 3) / 4 / 3, (2 + 1 + 0 + 1) / 4 / 3])
    np.testing.assert_allclose(scores(positions[:3] + 1, 1, 3)["error"], [0, (3 + 1 + 1) / 3 / 3, (2 + 1 + 0) / 3 / 3])


def test_a_prediction_of_one_step_has_no_path():
    loop = OpenLoop(WalkModel(), toy_config(chunk=2, horizons=(6,)), Walk(), images=False)
    assert measure(loop) is None
