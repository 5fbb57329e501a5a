"""Planning in a world whose answer is known: tokens move by the sum of the actions, plus a little noise."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlawm_jax.flow import Sampler
from rlawm_jax.planning.cost import GoalCost
from rlawm_jax.planning.goals import Problem
from rlawm_jax.planning.judge import Replanning, recorded, replayed, run, still, uniform
from rlawm_jax.planning.optimise import METHODS, Search, interpolation
from rlawm_jax.planning.planner import Planner
from rlawm_jax.sim.protocol import Task

CHUNK, WIDTH, NOISE = 4, 2, 0.01
BOUNDS = {"low": (-1.0, -1.0), "high": (1.0, 1.0)}
STEP = 0.1  # tokens move by this much for an action of 1


class Mover(nnx.Module):
    """Tokens [1, 2] are a position: every valid action row moves it, and so does the noise."""

    def noise(self, key, ids):
        return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (1, WIDTH)))(ids)

    def predict(self, tokens, actions, num_actions, robot_id, noise, sampler):
        valid = (jnp.arange(actions.shape[1]) < num_actions[:, None])[..., None]
        return tokens + STEP * (actions * valid).sum(axis=1)[:, None] + NOISE * noise, noise

    def encode(self, frames):
        return frames[:, 0, :1, :WIDTH].astype(jnp.float32) / 100.0


def make_planner(method="cem", *, approach="end", draws=2, batch=2, **settings):
    cost = GoalCost(chunk=CHUNK, draws=draws, approach=approach, sampler=Sampler("euler", 1))
    usual = {"rounds": 60, "candidates": 4} if method == "gradient" else {"rounds": 8, "candidates": 64}
    settings = usual | settings
    return Planner(Mover(), cost, Search(**BOUNDS, method=method, **settings), batch=batch)


def end_of(start, rows):
    return start + STEP * rows.sum(axis=1)[:, None]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_actions_that_reach_the_goal(method):
    start = np.array([[[0.0, 0.0]], [[0.2, 0.1]], [[0.5, 0.5]]], np.float32)
    goal = start + np.array([[[0.4, -0.3]], [[-0.5, 0.0]], [[0.1, 0.45]]], np.float32)
    rows = make_planner(method).plan(start, goal, 8, turn=0)
    assert rows.shape == (3, 8, 2)
    assert np.abs(rows).max() <= 1.0
    # standing still leaves 0.2 to 0.35 of mean absolute distance
    assert np.abs(end_of(start, rows) - goal).mean(axis=(1, 2)).max() < 0.05


def test_a_goal_out_of_reach_gets_the_bounds():
    start, goal = np.zeros((1, 1, 2), np.float32), np.full((1, 1, 2), 9.0, np.float32)
    rows = make_planner().plan(start, goal, CHUNK, turn=0)
    assert rows.mean() > 0.9


def test_plans_do_not_depend_on_the_batch_they_are_in():
    start = np.zeros((3, 1, 2), np.float32)
    goal = np.array([[[0.3, 0.1]], [[0.1, -0.2]], [[-0.3, 0.2]]], np.float32)
    planner = make_planner()
    together = planner.plan(start, goal, 8, turn=0)
    # the third is alone in its batch, filled up with itself
    alone = planner.plan(start[2:], goal[2:], 8, turn=0)
    np.testing.assert_allclose(together[2:], alone, atol=1e-6)


@pytest.mark.parametrize(("rows", "planned"), [(-3, 2), (1, 2), (3, 3), (5, 4), (6, 6), (7, 8), (9, 8), (11, 12)])
def test_a_plan_is_about_as_long_as_asked_in_predictions_of_equal_length(rows, planned):
    start = np.zeros((1, 1, 2), np.float32)
    planner = make_planner(rounds=1, candidates=2, every=2)
    assert planner.whole(rows) == planned
    assert planner.plan(start, start, rows, turn=0).shape[1] == planned


def test_effort_makes_the_plan_that_moves_less_the_cheaper_of_two_that_arrive():
    detour = np.concatenate([np.full((1, CHUNK, 2), 0.8), np.full((1, CHUNK, 2), -0.4)], axis=1)
    straight = np.full((1, 2 * CHUNK, 2), 0.2)
    actions = jnp.asarray(np.stack([detour, straight], axis=1), jnp.float32)
    start, goal = np.zeros((1, 1, 2), np.float32), np.full((1, 1, 2), STEP * CHUNK * 0.4, np.float32)
    for effort in (0.0, 0.1):
        cost = GoalCost(chunk=CHUNK, draws=1, approach="end", sampler=Sampler("euler", 1), effort=effort)
        costs = cost(Mover(), start, goal, jnp.zeros(1, jnp.int32), actions, jax.random.key(0))[0]
        assert float(costs[0] - costs[1]) == pytest.approx(effort * (0.6 - 0.2), abs=1e-6)


def test_the_closest_approach_forgives_overshooting_and_the_end_does_not():
    there_and_back = np.concatenate([np.full((1, 1, CHUNK, 2), 0.5), np.full((1, 1, CHUNK, 2), -0.5)], axis=2)
    start, goal = np.zeros((1, 1, 2), np.float32), np.full((1, 1, 2), STEP * CHUNK * 0.5, np.float32)
    costs = {}
    for approach in ("end", "closest"):
        cost = GoalCost(chunk=CHUNK, draws=1, approach=approach, sampler=Sampler("euler", 1))
        actions = jnp.asarray(there_and_back, jnp.float32)
        costs[approach] = float(cost(Mover(), start, goal, jnp.zeros(1, jnp.int32), actions, jax.random.key(0))[0, 0])
    assert costs["closest"] < 3 * NOISE
    assert costs["end"] == pytest.approx(STEP * CHUNK * 0.5, abs=4 * NOISE)


def test_all_candidates_of_a_goal_meet_the_same_noise_and_draws_average_it():
    start = np.zeros((2, 1, 2), np.float32)
    actions = jnp.zeros((2, 5, CHUNK, 2))

    def costs(draws):
        cost = GoalCost(chunk=CHUNK, draws=draws, approach="end", sampler=Sampler("euler", 1))
        goal = np.full((2, 1, 2), 1.0, np.float32)
        return np.asarray(cost(Mover(), start, goal, jnp.zeros(2, jnp.int32), actions, jax.random.key(3)))

    one, many = costs(1), costs(64)
    np.testing.assert_array_equal(one, one[:, :1].repeat(5, axis=1))  # equal actions, equal costs
    assert one[0, 0] != one[1, 0]  # goals have noise of their own
    assert np.abs(many - 1.0).max() < NOISE / 2


def test_knots_are_joined_by_straight_lines():
    weights = interpolation(3, 8, 4)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    np.testing.assert_allclose(weights @ [0.0, 4.0, 8.0], np.arange(8), atol=1e-6)


class Table:
    """The same world as a simulator: an effector that moves, an object that does not."""

    task = Task("table", (-1.0, -1.0), (1.0, 1.0), 10.0, 50, "way", 0.9, (0.5,), "anywhere")

    def replay(self, state, actions):
        self.at = np.array(state) + STEP * np.sum(actions, axis=0)

    def step(self, action):
        self.at = self.at + STEP * np.clip(action, -1, 1)

    def hold(self):
        return np.zeros(2)

    def positions(self):
        return np.stack([self.at, np.zeros(2)])

    def render(self):
        frame = np.zeros((2, 2, 3), np.uint8)
        frame[..., :2] = np.round(np.clip(self.at * 100, 0, 255))
        return frame


def test_the_judge_replays_plans_and_compares_with_floors_and_roof():
    rng = np.random.default_rng(0)
    actions = rng.uniform(0, 0.5, (3, 20, 2))
    problems = []
    for row in range(3):
        world = Table()
        world.replay(np.full(2, 0.1), actions[row][:5])
        before = world.positions()
        for action in actions[row][5:13]:
            world.step(action)
        problems.append(
            Problem(row, 5, np.full(2, 0.1), actions[row], world.render(), world.positions(), before, ahead=8)
        )
    worlds = [Table() for _ in problems]
    planner = make_planner()
    # as recorded: this world forgets nothing and rounds nothing
    for problem in problems:
        again = replayed(replace(problem, goal_positions=problem.goal_positions + 1), worlds[0])
        np.testing.assert_allclose(again.goal_positions, problem.goal_positions)
        np.testing.assert_allclose(again.start_positions, problem.start_positions)
        np.testing.assert_array_equal(again.goal_frame, problem.goal_frame)
    methods = {"plan": Replanning(planner, problems, execute=CHUNK), "recorded": recorded(problems), "still": still}
    judged = {name: run(name, choose, worlds, problems, 12) for name, choose in methods.items()}
    judged["random"] = run("random", uniform(problems), worlds, problems, 12)
    start = np.stack([np.linalg.norm(p.goal_positions - p.start_positions, axis=-1) for p in problems])
    for one in judged.values():
        assert one.distances.shape == (3, 13, 2)
        np.testing.assert_allclose(one.distances[:, 0], start, atol=1e-12)
        np.testing.assert_array_equal(one.distances[..., 1], 0.0)
    assert judged["recorded"].best[:, 0].max() < 1e-9
    np.testing.assert_allclose(judged["still"].final[:, 0], start[:, 0], atol=1e-12)
    assert judged["plan"].final[:, 0].max() < 0.05 < start[:, 0].min()
