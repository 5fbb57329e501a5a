"""A Franka arm that pushes a cube on a table: panda-gym's robot in PyBullet, seen by a camera that the arm fills.

World: metres, z up, the table at z = 0, the robot's base at x = -0.6. Actions [3] are displacements of the closed
gripper in units of 5 cm, each in [-1, 1], at 25 Hz. State [9]: gripper x, y, z; cube x, y, z and its angle about z
(radians); mark x, y. The mark, a red square on the table, shows a goal; without one it is `NO_MARK`, out of sight.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import numpy as np
import pybullet
from jaxtyping import Float, UInt8
from panda_gym.envs.robots.panda import Panda
from panda_gym.pybullet import PyBullet

CONTROL_HZ = 25.0
STEP_LENGTH = 0.05  # metres that an action of 1 asks for; panda-gym's
CUBE = 0.07  # side in metres
FRICTION = 1.0  # of the cube; with PyBullet's 0.5 it slides on for centimetres after a push
MARK = 0.05
NO_MARK = (9.0, 9.0)
BASE = (-0.6, 0.0, 0.0)
CAMERA = {"cameraTargetPosition": (-0.05, 0.0, 0.08), "distance": 0.62, "yaw": 70.0, "pitch": -40.0, "roll": 0.0}
FIELD_OF_VIEW = 60.0  # degrees
NEAR, FAR = 0.1, 10.0
BACKGROUND = 223.0
IK_ROUNDS = 20


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that PyBullet's C++ side prints when a world is made."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def camera_matrix() -> Float[np.ndarray, "4 4"]:
    """From homogeneous world coordinates to clip coordinates: x / w and y / w in [-1, 1], y up, are the frame."""
    view = pybullet.computeViewMatrixFromYawPitchRoll(**CAMERA, upAxisIndex=2)
    projection = pybullet.computeProjectionMatrixFOV(FIELD_OF_VIEW, 1.0, NEAR, FAR)
    # OpenGL's matrices are column-major
    return np.reshape(projection, (4, 4), order="F") @ np.reshape(view, (4, 4), order="F")


class World:
    """One table with one arm and one cube: reset, step, read, render."""

    def __init__(self, image_size: int = 112) -> None:
        self.image_size = image_size
        with _quiet():
            self._sim = PyBullet(render_mode="rgb_array", renderer="Tiny", background_color=np.full(3, BACKGROUND))
        self._client = self._sim.physics_client
        self._view = self._client.computeViewMatrixFromYawPitchRoll(**CAMERA, upAxisIndex=2)
        self._projection = self._client.computeProjectionMatrixFOV(FIELD_OF_VIEW, 1.0, NEAR, FAR)

    def reset(self, state: Float[np.ndarray, "9"]) -> None:
        """Build the world anew in this state, at rest (0.1 s).

        Moving the bodies of an old world back would leave traces of the last episode in PyBullet's solver: states
        then differ by millimetres after 40 steps. A new world is exact.
        """
        state = np.asarray(state, np.float64)
        self._build(state)
        for _ in range(IK_ROUNDS):  # PyBullet's inverse kinematics takes steps towards a solution
            angles = self._robot.inverse_kinematics(self._robot.ee_link, state[:3], np.array([1.0, 0.0, 0.0, 0.0]))
            self._robot.set_joint_angles(np.array([*angles[:7], 0.0, 0.0]))
        self._mark = state[7:]

    def _build(self, state: Float[np.ndarray, "9"]) -> None:
        self._client.resetSimulation()
        self._client.setTimeStep(self._sim.timestep)
        self._client.setGravity(0, 0, -9.81)
        self._robot = Panda(self._sim, block_gripper=True, base_position=np.array(BASE))
        self._robot.reset()
        self._sim.create_plane(z_offset=-0.4)
        self._sim.create_table(length=1.1, width=0.7, height=0.4, x_offset=-0.3)
        green, red = np.array([0.1, 0.9, 0.1, 1.0]), np.array([0.9, 0.1, 0.1, 1.0])
        self._sim.create_box("cube", np.full(3, CUBE / 2), 1.0, state[3:6], rgba_color=green, lateral_friction=FRICTION)
        turn = np.array([0.0, 0.0, np.sin(state[6] / 2), np.cos(state[6] / 2)])
        self._sim.set_base_pose("cube", state[3:6], turn)
        flat = np.array([MARK / 2, MARK / 2, 0.0005])
        self._sim.create_box("mark", flat, 0.0, np.array([*state[7:], 0.0]), rgba_color=red, ghost=True)

    def step(self, action: Float[np.ndarray, "3"]) -> None:
        """Ask for a displacement of the gripper and let 0.04 s pass."""
        self._robot.set_action(np.asarray(action, np.float64))
        self._sim.step()

    @property
    def gripper(self) -> Float[np.ndarray, "3"]:
        """Position between the fingertips, in metres."""
        return np.array(self._robot.get_ee_position())

    @property
    def cube(self) -> Float[np.ndarray, "3"]:
        """Centre of the cube, in metres."""
        return np.array(self._sim.get_base_position("cube"))

    @property
    def mark(self) -> Float[np.ndarray, "2"]:
        """Centre of the mark on the table, in metres; `NO_MARK` where there is none."""
        return self._mark

    @property
    def state(self) -> Float[np.ndarray, "9"]:
        """Gripper [3], cube [3], cube angle about z in (-pi, pi], mark [2]."""
        return np.array([*self.gripper, *self.cube, self._sim.get_base_rotation("cube")[2], *self._mark])

    def render(self) -> UInt8[np.ndarray, "h w 3"]:
        """The camera's frame, by PyBullet's own renderer (no graphics card, no display)."""
        size = self.image_size
        # shadows would double the time and are hardly visible here
        options = {"shadow": 0, "flags": pybullet.ER_NO_SEGMENTATION_MASK, "renderer": pybullet.ER_TINY_RENDERER}
        image = self._client.getCameraImage(size, size, self._view, self._projection, **options)[2]
        return np.asarray(image, np.uint8).reshape(size, size, 4)[..., :3]

    def close(self) -> None:
        """Free the world's memory, about 100 MB."""
        self._sim.close()


def versions() -> dict[str, str]:
    """The package versions that determine whether a trace replays to the same states."""
    from importlib.metadata import version

    return {name: version(name) for name in ("pybullet", "panda-gym")}
