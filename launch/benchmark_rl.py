"""Imagined chunks per second: python -m launch.benchmark_rl --config=configs/X.py[:variant] --config.policy=RUN.

Prints a table of the compiled rollout against the same steps driven from Python; takes the flags of launch.train_rl.
"""

from absl import flags

from launch import cli

CONFIG = cli.define_config()
BATCHES = flags.DEFINE_multi_integer(
    "batch", [1, 16, 64], "Environments at once; give it several times.", lower_bound=1
)
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed episodes each way, in turn.", lower_bound=1)
flags.mark_flag_as_required("config")


def main() -> None:
    """Prepare the run given by the flags, and time it."""
    from rlawm_jax.rl.benchmark import format_markdown, measure
    from rlawm_jax.rl.setup import prepare

    print(format_markdown(measure(prepare(CONFIG.value), BATCHES.value, REPEATS.value)))


if __name__ == "__main__":
    cli.run(main)
