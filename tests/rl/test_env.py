"""The imagined environment: starts, rewards, ends, and its single form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlawm_jax.rl.demonstrations import Bank, build_bank
from rlawm_jax.rl.env import EnvParams, EnvSpec, ImaginationEnv, SingleEnv, distance
from rlawm_jax.rng import stream
from rlawm_jax.sharding import make_mesh
from tests.rl.toy import CHUNK, EPISODES, FRAMES, SPEC, STEP, ToyWorld, demonstrations


@pytest.fixture(scope="module")
def bank() -> Bank:
    return build_bank(demonstrations(), "bfloat16", make_mesh(-1, 1, 1))


def perfect(b: int) -> jnp.ndarray:
    return jnp.tile(jnp.array([STEP, 0.0, 0.0]), (b, CHUNK, 1))


def stand(bank: Bank, frames: list[int], episode: int = 0):
    where = jnp.array(frames, jnp.int32)
    return ImaginationEnv(SPEC).at(ToyWorld(), bank, jnp.full_like(where, episode), where)


def step(bank: Bank, state, actions, **changes):
    env = ImaginationEnv(dataclasses.replace(SPEC, **changes))
    return env.step(ToyWorld(), bank, state, actions, jax.random.key(0), jnp.arange(len(actions), dtype=jnp.uint32))


def test_starts_are_first_frames_or_uniform_over_those_that_leave_a_chunk(bank):
    ids = jnp.arange(4000, dtype=jnp.uint32)
    state = ImaginationEnv(SPEC).reset(ToyWorld(), bank, jax.random.key(1), ids)
    starts = FRAMES - 1 - CHUNK + 1
    counts = np.bincount(np.asarray(state.frame), minlength=FRAMES)
    assert counts[starts:].sum() == 0
    expected = np.full(starts, 2000 / starts)
    expected[0] += 2000
    np.testing.assert_allclose(counts[:starts], expected, atol=6 * np.sqrt(4000 * 0.25))
    episodes = np.bincount(np.asarray(state.episode), minlength=EPISODES)
    np.testing.assert_allclose(episodes, 4000 / EPISODES, atol=6 * np.sqrt(4000 / EPISODES))
    assert (state.chunks == 0).all()


def test_a_start_depends_on_its_id_and_not_on_its_place(bank):
    env, key = ImaginationEnv(SPEC), jax.random.key(1)
    all_of_them = env.reset(ToyWorld(), bank, key, jnp.arange(8, dtype=jnp.uint32))
    some = env.reset(ToyWorld(), bank, key, jnp.array([5, 2], jnp.uint32))
    np.testing.assert_array_equal(some.frame, all_of_them.frame[jnp.array([5, 2])])
    np.testing.assert_array_equal(some.tokens, all_of_them.tokens[jnp.array([5, 2])])


def test_demonstrations_too_short_for_a_chunk_are_never_drawn():
    demos = dataclasses.replace(demonstrations(), lengths=np.array([FRAMES, CHUNK + 1, FRAMES, FRAMES, FRAMES, 4]))
    bank = build_bank(demos, "bfloat16", make_mesh(-1, 1, 1))
    state = ImaginationEnv(SPEC).reset(ToyWorld(), bank, jax.random.key(0), jnp.arange(500, dtype=jnp.uint32))
    assert set(np.unique(state.episode)) == {0, 2, 3, 4, 5}


def test_the_demonstrations_own_actions_have_reward_zero_and_others_the_distance(bank):
    state = stand(bank, [0, 1, 2])
    _, outcome = step(bank, state, perfect(3))
    np.testing.assert_allclose(outcome.reward, 0, atol=1e-5)  # the bank is bfloat16
    off = perfect(3).at[:, 0, 1].add(0.3)
    _, outcome = step(bank, state, off)
    np.testing.assert_allclose(outcome.reward, -5 * 0.3**2 / 3, rtol=0.02)


def test_actions_beyond_the_bounds_move_the_imagined_world_as_they_move_the_simulator(bank):
    bounds = {"action_low": (-1.0, 0.0, 0.0), "action_high": (STEP, 0.2, 1.0)}
    wild = perfect(1) + jnp.array([7.0, -3.0, 0.5])
    clipped, outcome = step(bank, stand(bank, [0]), wild, **bounds)
    allowed = jnp.broadcast_to(jnp.array([STEP, 0.0, 0.5]), wild.shape)
    expected, same = step(bank, stand(bank, [0]), allowed)
    np.testing.assert_array_equal(clipped.tokens, expected.tokens)
    np.testing.assert_array_equal(outcome.reward, same.reward)
    free, _ = step(bank, stand(bank, [0]), wild)  # without bounds nothing is clipped
    assert np.abs(free.tokens - expected.tokens).max() > 1


def test_goal_looks_at_the_last_frame_and_corresponding_at_the_same_time(bank):
    state = stand(bank, [0])
    _, outcome = step(bank, state, perfect(1), target="goal", metric="l1")
    left = STEP * (FRAMES - 1 - CHUNK)
    np.testing.assert_allclose(outcome.distance, left / 3, rtol=0.01)
    np.testing.assert_allclose(outcome.reward, -5 * left / 3, rtol=0.01)


def test_distances_are_their_definitions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 5, 6)).astype(np.float32)
    np.testing.assert_allclose(distance(a, b, "l1"), np.abs(a - b).mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(distance(a, b, "l2"), ((a - b) ** 2).mean((1, 2)), rtol=1e-5)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(distance(a, b, "cosine"), 1 - cosine.mean(-1), rtol=1e-4)


def test_the_end_of_the_demonstration_terminates_and_the_limit_truncates(bank):
    # six frames left, five, two, one: predictions of two frames
    state = stand(bank, [2, 3, 6, 7])
    ends = []
    for _ in range(3):
        state, outcome = step(bank, state, perfect(4))
        ends.append((np.asarray(outcome.terminated).tolist(), np.asarray(outcome.truncated).tolist()))
        assert not (outcome.terminated & outcome.truncated).any()
    assert ends[0] == ([False, False, True, True], [False] * 4)
    assert ends[2][0][:2] == [True, True]  # the end and the limit at once is an end
    state = stand(bank, [0])
    for i in range(3):
        state, outcome = step(bank, state, perfect(1))
        assert bool(outcome.truncated[0]) == (i == 2) and not outcome.terminated[0]
    assert state.frame[0] == 6


def test_success_is_a_finished_episode_near_the_goal_and_earns_the_bonus(bank):
    near, far = perfect(1), perfect(1) + 0.5
    _, outcome = step(bank, stand(bank, [6]), near, terminal_bonus=0.5, success_threshold=1e-3)
    assert outcome.success[0] and np.isclose(outcome.reward[0], 0.5, atol=1e-3)
    _, outcome = step(bank, stand(bank, [6]), far, terminal_bonus=0.5, success_threshold=1e-3)
    assert not outcome.success[0] and outcome.reward[0] < 0
    _, outcome = step(bank, stand(bank, [0]), near, terminal_bonus=0.5, success_threshold=1e9)
    assert not outcome.success[0]  # close, but not at an end


def test_a_reward_over_several_draws_is_their_mean_and_the_state_goes_on_from_the_first(bank):
    world, start, ids = ToyWorld(noise=0.3), stand(bank, [0, 1, 2]), jnp.arange(3, dtype=jnp.uint32)
    key = jax.random.key(5)

    def outcomes(draws, **changes):
        env = ImaginationEnv(dataclasses.replace(SPEC, reward_draws=draws, **changes))
        return env.step(world, bank, start, perfect(3), key, ids)

    one, several = outcomes(1), outcomes(4)
    np.testing.assert_array_equal(one[0].tokens, several[0].tokens)
    np.testing.assert_array_equal(one[1].success, several[1].success)
    keys = [key, *(stream(key, "reward_draw", i) for i in range(1, 4))]
    truth = start.tokens + jnp.array([CHUNK * STEP, 0, 0])
    at_end = start.tokens.at[:, 0, 0].set(STEP * (FRAMES - 1))
    drawn = [truth + 0.3 * world.noise(k, ids) for k in keys]
    for target, reference in (("corresponding", truth), ("goal", at_end)):
        expected = -5 * np.mean([distance(tokens, reference, "l2") for tokens in drawn], axis=0)
        found = outcomes(4, target=target)[1].reward
        np.testing.assert_allclose(found, expected, rtol=0.02)  # the bank is bfloat16
    np.testing.assert_allclose(several[1].distance, -several[1].reward / 5, rtol=1e-6)
    assert np.abs(one[1].reward - several[1].reward).min() > 1e-3


def test_what_the_policy_sees_is_decoded_at_a_reset_as_at_a_step(bank):
    env = ImaginationEnv(SPEC)
    state = stand(bank, [3])
    np.testing.assert_array_equal(env.observe(ToyWorld(), state), state.tokens.reshape(1, 1, 1, 3))


def test_the_single_form_runs_under_vmap_and_resets_itself(bank):
    env, params = SingleEnv(SPEC), EnvParams(ToyWorld(), bank)
    keys = jax.random.split(jax.random.key(0), 16)
    observation, state = jax.vmap(env.reset, (0, None))(keys, params)
    assert observation.shape == (16, 1, 1, 3)
    advance = jax.jit(jax.vmap(env.step, (0, 0, 0, None)))
    finished = 0
    for i in range(6):
        before = state
        keys = jax.random.split(jax.random.key(i + 1), 16)
        observation, state, reward, done, info = advance(keys, state, perfect(16).reshape(16, -1), params)
        within = before.frame + CHUNK < FRAMES  # a last chunk longer than what is left walks past the end
        np.testing.assert_allclose(np.where(within, reward, 0), 0, atol=1e-4)
        np.testing.assert_array_equal(done, info["terminated"] | info["truncated"])
        np.testing.assert_array_equal(state.chunks, np.where(done, 0, before.chunks + 1))
        np.testing.assert_allclose(observation.reshape(16, 1, 3), state.tokens, atol=1e-6)
        moved = before.tokens + jnp.array([CHUNK * STEP, 0, 0])
        np.testing.assert_allclose(info["final_observation"].reshape(16, 1, 3), moved, atol=1e-5)
        finished += int(done.sum())
    assert finished >= 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "l3"}, r"config\.env\.metric: expected one of l1, l2, cosine, found 'l3'"),
        ({"target": "next"}, r"config\.env\.target: expected one of corresponding, goal"),
        ({"reward_draws": 0}, r"config\.env\.reward_draws: expected 1 or more, found 0"),
        ({"chunk": 0}, r"config\.env\.chunk: expected 1 or more, found 0"),
        ({"initial_prob": 2.0}, r"config\.env\.initial_prob"),
        ({"action_low": (0.0,)}, r"config\.env\.action_low, action_high: expected as many .* found \(0\.0,\) and \(\)"),
        (
            {"action_low": (0.0, 1.0), "action_high": (1.0, 1.0)},
            r"each below it, or none where actions are not clipped",
        ),
    ],
)
def test_bad_rules_name_their_field(changes, message):
    with pytest.raises(ValueError, match=message):
        EnvSpec(**changes)
