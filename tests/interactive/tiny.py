"""A session without a dataset or a trained model: a tiny random world model, drawn starts, a simulator of a square."""

import contextlib
import functools
import threading

import numpy as np

from data.description import Description
from rlawm_jax.flow import Sampler
from rlawm_jax.interactive.rollout import Rollout
from rlawm_jax.interactive.server import Server
from rlawm_jax.interactive.session import Session
from rlawm_jax.interactive.starts import Start
from rlawm_jax.sim.protocol import Task
from tests.tiny_models import IMAGE_SIZE, tiny_world

ROWS, WIDTH = 3, 3  # the model has a robot of two numbers, 0, and one of three, 2
SAMPLER = Sampler("euler", 2)


class Store:
    """What a session reads of a dataset: six episodes of nine action rows."""

    reference, action_dim = "stick:play", 2
    description = Description(hold_still="zeros")

    def __init__(self, hold_still="zeros"):
        self.description = Description(hold_still=hold_still)

    def __len__(self):
        return 6

    def actions(self, row):
        return np.random.default_rng(row).uniform(-0.9, 0.9, (9, 2)).astype(np.float32)


class Starts:
    """Numbered starts of random frames; the number is also the episode's."""

    def __init__(self, store, *, states=True):
        self.store, self.states = store, states

    def __getitem__(self, number):
        actions = self.store.actions(number)
        return Start(
            store=self.store,
            episode=number,
            frame=4,
            image=np.random.default_rng(number).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
            robot_id=0,
            recorded=actions[4],
            rest=None if self.store.description.hold_still is None else np.full(2, 0.25, np.float32),
            before=(np.full(2, 0.5), actions[:4]) if self.states else None,
        )


class Dot:
    """A simulator: a bright square moves by what it is told."""

    task = Task("dot", (-1.0, -1.0), (1.0, 1.0), 10.0, 50, "way", 0.9, (0.5,), "anywhere")

    def replay(self, state, actions):
        self.at = np.asarray(state) + 0.1 * np.sum(actions, axis=0)

    def step(self, action):
        self.at = self.at + 0.1 * np.asarray(action)

    def render(self):
        frame = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        row, column = (np.clip(self.at, 0, 1) * (IMAGE_SIZE - 8)).astype(int)
        frame[row : row + 8, column : column + 8] = 255
        return frame


@functools.cache  # it has no state, and compiling takes seconds
def tiny_rollout(*, last_action=False):
    return Rollout(tiny_model(), SAMPLER, rows=ROWS, width=WIDTH, last_action=last_action)


@functools.cache
def tiny_model():
    return tiny_world(backbone=True)


def tiny_session(*, simulator=True, hold_still="zeros"):
    dot = Dot() if simulator else None
    return Session(tiny_rollout(), Starts(Store(hold_still)), lambda store: dot)


@contextlib.contextmanager
def serving(session, page):
    """A server in a thread of its own, on any free port."""
    server = Server(0)
    thread = threading.Thread(target=server.run, args=(session, page))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
