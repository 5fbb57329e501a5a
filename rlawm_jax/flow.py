"""Flow matching between latents and noise: interpolant, velocity target, time schedules, ODE samplers (METHOD.md 4).

Time runs from data (t = 0) to noise (t = 1). Pure functions, no modules.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# as in the release: noise that remains on a path at t = 0
SIGMA_MIN = 1e-5

Velocity = Callable[[Float[Array, "b k d"], Float[Array, " b"]], Float[Array, "b k d"]]


def interpolate(
    x0: Float[Array, "b k d"], noise: Float[Array, "b k d"], t: Float[Array, " b"], sigma_min: float = SIGMA_MIN
) -> Float[Array, "b k d"]:
    """x_t = (1 - t) x0 + (sigma + (1 - sigma) t) noise."""
    t = t[:, None, None]
    return (1 - t) * x0 + (sigma_min + (1 - sigma_min) * t) * noise


def velocity_target(
    x0: Float[Array, "b k d"], noise: Float[Array, "b k d"], sigma_min: float = SIGMA_MIN
) -> Float[Array, "b k d"]:
    """dx_t / dt = (1 - sigma) noise - x0."""
    return (1 - sigma_min) * noise - x0


def sample_times(key: Array, shape: tuple[int, ...], schedule: str = "logit_normal") -> Float[Array, "..."]:
    """Training times in (0, 1): "logit_normal" is sigmoid(N(0, 1)), as in the release; "uniform" is U(0, 1)."""
    if schedule == "logit_normal":
        return jax.nn.sigmoid(jax.random.normal(key, shape))
    if schedule == "uniform":
        return jax.random.uniform(key, shape)
    raise ValueError(f"config.denoiser.time_schedule: expected logit_normal or uniform, found {schedule!r}")


def _euler(velocity: Velocity, x: Array, t: Array, dt: float) -> Array:
    return x - dt * velocity(x, t)


def _midpoint(velocity: Velocity, x: Array, t: Array, dt: float) -> Array:
    half = x - 0.5 * dt * velocity(x, t)
    return x - dt * velocity(half, t - 0.5 * dt)


def _heun(velocity: Velocity, x: Array, t: Array, dt: float) -> Array:
    first = velocity(x, t)
    return x - 0.5 * dt * (first + velocity(x - dt * first, t - dt))


SOLVERS = {"euler": _euler, "midpoint": _midpoint, "heun": _heun}


def check_sampler(solver: str, steps: int) -> None:
    """Raise ValueError for an unknown solver or fewer than one step."""
    if solver not in SOLVERS:
        raise ValueError(f"config.sampler.solver: expected one of {', '.join(SOLVERS)}, found {solver!r}")
    if steps < 1:
        raise ValueError(f"config.sampler.steps: expected at least 1, found {steps}")


def sample(
    velocity: Velocity, noise: Float[Array, "b k d"], steps: int, solver: str = "euler"
) -> Float[Array, "b k d"]:
    """Integrate dx/dt = velocity(x, t) from noise at t = 1 down to t = 0 in `steps` equal steps.

    "euler" evaluates the velocity once per step and is the release's sampler (30 steps); "midpoint" and "heun" evaluate
    it twice and are second-order.
    """
    check_sampler(solver, steps)
    advance = SOLVERS[solver]

    def step(x, i):
        # computed from i, so that rounding does not accumulate over the steps
        t = jnp.full((x.shape[0],), 1.0) - i / steps
        return advance(velocity, x, t, 1.0 / steps), None

    # a scan: the program does not grow with the number of steps
    return jax.lax.scan(step, noise, jnp.arange(steps, dtype=jnp.float32))[0]


@dataclass(frozen=True)
class Sampler:
    """How a latent is drawn: ODE solver ("euler", "midpoint", "heun"), its number of steps, and the noise's scale.

    `temperature` multiplies the standard normal noise that the flow starts from.
    """

    solver: str
    steps: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_sampler(self.solver, self.steps)


# At t = 1 the noise says nothing about the latent, so the velocity's target is the noise minus the expected latent:
# one Euler step from zero noise gives that expectation, for the price of a thirtieth of a sample.
MEAN = Sampler("euler", 1, temperature=0.0)
