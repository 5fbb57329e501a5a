"""The real gym-pusht simulator, stepped without its per-step coverage and rendered without the action marker.

World: 512 x 512 pixels, y down. State [5]: agent x, agent y, block x, block y (pixels), block angle (radians). The
block's position is the middle of the T's bar; its centre of gravity lies 45 px down the stem. Actions are target
positions of the agent at 10 Hz.
"""

import os

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import numpy as np
import pymunk
from gym_pusht.envs.pusht import PushTEnv
from jaxtyping import Float, UInt8

WORLD = 512.0
CONTROL_HZ = 10.0
GOAL = np.array([256.0, 256.0, np.pi / 4])
CENTRE_OF_GRAVITY = np.array([0.0, 45.0])
AGENT_RADIUS = 15.0


def rotation(angle: float) -> Float[np.ndarray, "2 2"]:
    """The matrix that turns block coordinates into world directions."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def to_world(pose: Float[np.ndarray, "3"], points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
    """Transform points from block to world coordinates, for a block pose (x, y, angle)."""
    return points @ rotation(pose[2]).T + pose[:2]


class _Env(PushTEnv):
    """PushTEnv whose step skips the coverage (polygon clipping costs more than the physics)."""

    def _get_coverage(self) -> float:
        return 0.0

    def coverage(self) -> float:
        return float(super()._get_coverage())


class PushT:
    """A Push-T world: reset, step, read, render."""

    def __init__(self, image_size: int = 96) -> None:
        self._env = _Env(obs_type="state", observation_width=image_size, observation_height=image_size)

    def reset(self, state: Float[np.ndarray, "5"]) -> None:
        """Start a new world in exactly this state, at rest."""
        agent, block = np.asarray(state[:2], np.float64), np.asarray(state[2:], np.float64)
        # gym-pusht sets the position before the angle, and pymunk rotates bodies about their centre of gravity.
        shift = CENTRE_OF_GRAVITY - rotation(block[2]) @ CENTRE_OF_GRAVITY
        self._env.reset(options={"reset_to_state": np.array([*agent, *(block[:2] - shift), block[2]])})
        self.place(agent, block)

    def place(self, agent: Float[np.ndarray, "2"], block: Float[np.ndarray, "3"]) -> None:
        """Place agent and block exactly at these poses, at rest, in the world that was last reset (for planning)."""
        env = self._env
        env.agent.position, env.agent.velocity = tuple(agent), (0, 0)
        env.block.angle = block[2]
        env.block.position, env.block.velocity, env.block.angular_velocity = tuple(block[:2]), (0, 0), 0
        env.space.reindex_shapes_for_body(env.agent)
        env.space.reindex_shapes_for_body(env.block)

    def step(self, action: Float[np.ndarray, "2"]) -> None:
        """Hold the target position (pixels) for 0.1 s."""
        self._env.step(np.asarray(action, np.float64))

    @property
    def agent(self) -> Float[np.ndarray, "2"]:
        """Agent position in pixels."""
        return np.array(self._env.agent.position)

    @property
    def block(self) -> Float[np.ndarray, "3"]:
        """Block x, y (pixels) and angle (radians, not wrapped)."""
        body = self._env.block
        return np.array([*body.position, body.angle])

    @property
    def state(self) -> Float[np.ndarray, "5"]:
        """Agent x, y, block x, y (pixels), block angle in [0, 2 pi)."""
        x, y, angle = self.block
        return np.array([*self.agent, x, y, angle % (2 * np.pi)])

    def coverage(self) -> float:
        """gym-pusht's success measure: the share of the goal area that the block covers, 0 to 1."""
        return self._env.coverage()

    def render(self) -> UInt8[np.ndarray, "h w 3"]:
        """The observation image: goal, block and agent; no marker at the action target."""
        return self._env._render(visualize=False)


def versions() -> dict[str, str]:
    """The package versions that determine whether a trace replays to the same poses."""
    from importlib.metadata import version

    return {"pymunk": pymunk.version, "gym-pusht": version("gym-pusht")}
