"""The release's three robots, and the joint rows that its world model is conditioned on (METHOD.md 13.3).

The release normalises a controller target by joint limits and back before expanding it to all joints: the limits
cancel, so arm joints stay unchanged, in raw radians, and only grippers are clamped. No simulator is needed.
"""

import numpy as np
from jaxtyping import Float32

from data.release import Robot

PANDA_OPEN = 0.04  # metres per finger
ROBOTIQ_CLOSED = 0.81  # radians of the outer knuckle
ROBOTIQ_INNER = 0.88 / 0.81  # inner joints relative to the outer knuckle


def full_qpos(robot: Robot, targets: Float32[np.ndarray, "t a"]) -> Float32[np.ndarray, "t j"]:
    """Controller targets -> all joints: arm unchanged, gripper clamped and copied to its joints.

    One column beyond the arm's is the gripper (for ur10e wrist 3, which is fixed at 0); none means a closed gripper.
    ValueError for any other width.
    """
    arm, width = robot.arm, targets.shape[1]
    if width not in (arm, arm + 1):
        raise ValueError(f"{arm} or {arm + 1} columns for {robot.name}, found {width}")
    out = np.zeros((len(targets), robot.joints), np.float32)
    out[:, :arm] = targets[:, :arm]
    gripper = targets[:, arm] if width > arm else None
    if robot.name == "panda" and gripper is not None:
        out[:, 7:] = np.clip(gripper, 0.0, PANDA_OPEN)[:, None]
    elif robot.name == "xarm6_robotiq":
        closed = np.full(len(targets), ROBOTIQ_CLOSED, np.float32)
        knuckle = closed if gripper is None else np.clip(gripper, 0.0, ROBOTIQ_CLOSED)
        out[:, 6:] = knuckle[:, None] * np.array([1, ROBOTIQ_INNER, 1, ROBOTIQ_INNER, -ROBOTIQ_INNER, -ROBOTIQ_INNER])
    return out
