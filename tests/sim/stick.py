"""A simulator with no simulator: a point on a line, pushed towards 1; the score is where it is."""

import numpy as np

from rlawm_jax.sim.protocol import Task

TASK = Task(
    simulator="stick",
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
    control_hz=5.0,
    max_steps=20,
    score="way",
    success_above=0.85,
    levels=(0.5,),
    starts="point at seed / 1000",
)


class Stick:
    """Actions [2]: the first moves the point by that many tenths. The frame's red is the way in percent."""

    task = TASK

    def __init__(self):
        self.renders = 0

    def reset(self, seed):
        self.way = seed / 1000

    def step(self, action):
        self.way = float(np.clip(self.way + 0.1 * action[0], 0, 1))

    def hold(self):
        return np.zeros(2)

    def score(self):
        return self.way

    def render(self):
        self.renders += 1
        return np.full((6, 5, 3), round(100 * self.way), np.uint8)


class Pusher:
    """Moves on by what it sees: full speed for points before the middle, else nothing; notes its batches."""

    image_size = 6

    def __init__(self, rows=8):
        self.rows, self.batches = rows, []

    def act(self, frames):
        self.batches.append(len(frames))
        speed = (frames[:, 0, 0, 0] < 50).astype(np.float32)
        return np.broadcast_to(speed[:, None, None], (len(frames), self.rows, 2)).copy()
