"""Push-T from gym-pusht, with start poses drawn as for the planned demonstrations (data/pusht/plan.py)."""

import numpy as np
from jaxtyping import Float, UInt8

from data.pusht import motion
from data.pusht.plan import DONE_COVERAGE, START_CENTRES
from data.pusht.sim import CONTROL_HZ, WORLD, PushT, versions
from rlawm_jax.sim.protocol import Task

TASK = Task(
    simulator="pusht",
    action_low=(0.0, 0.0),
    action_high=(WORLD, WORLD),
    control_hz=CONTROL_HZ,
    max_steps=207,  # 1.5 times the longest demonstration's 138 frames
    score="coverage",
    success_above=DONE_COVERAGE,  # gym-pusht's threshold, at which its episodes end
    levels=(0.9,),  # the dataset's criterion of success
    # only seed 0 is also the start of a recording (default_rng([0, 0, 0]) is default_rng(0)); launch starts at 10,000
    starts="starts drawn as the demonstrations' were, none of them reused; block centre uniform in "
    f"{[int(end) for end in START_CENTRES]}^2 px at any angle, agent clear of the block",
    versions=versions(),
)


class PushTSimulator:
    """A Push-T world; actions are target positions of the agent in pixels, 0 to 512."""

    task = TASK

    def __init__(self, image_size: int) -> None:
        self._world = PushT(image_size)

    def start(self, seed: int) -> Float[np.ndarray, "5"]:
        """The state that an episode starts from."""
        return motion.random_start(np.random.default_rng(seed), *START_CENTRES)

    def reset(self, seed: int) -> None:
        """Start a new episode at rest."""
        self._world.reset(self.start(seed))

    def step(self, action: Float[np.ndarray, "2"]) -> None:
        """Send the agent to a target for 0.1 s."""
        self._world.step(np.clip(action, TASK.action_low, TASK.action_high))

    def hold(self) -> Float[np.ndarray, "2"]:
        """The agent's position."""
        return self._world.agent

    def score(self) -> float:
        """The share of the goal area that the block covers."""
        return self._world.coverage()

    def replay(self, state: Float[np.ndarray, "5"], actions: Float[np.ndarray, "t 2"]) -> None:
        """Start in a recorded state, at rest, and execute actions."""
        self._world.reset(state)
        for action in actions:
            self.step(action)

    def positions(self) -> Float[np.ndarray, "2 2"]:
        """Agent and block (its centre of gravity), in workspace widths."""
        return np.stack([self._world.agent, motion.centre(self._world.block)]) / WORLD

    def render(self) -> UInt8[np.ndarray, "h w 3"]:
        """The frame as the dataset would hold it for this state."""
        return self._world.render()
