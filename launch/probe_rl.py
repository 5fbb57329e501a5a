"""Can PPO gain anything here? python -m launch.probe_rl --config=configs/X.py[:variant] --config.policy=RUN.

Prints the imagined returns of recorded, cloned and wrong actions, and what the reward depends on; takes the flags of
launch.train_rl and trains nothing.
"""

from absl import flags

from launch import cli

CONFIG = cli.define_config()
DRAWS = flags.DEFINE_integer("draws", 8, "Draws of actions and of noise from every start.", lower_bound=2)
flags.mark_flag_as_required("config")


def main() -> None:
    """Prepare the run given by the flags, and measure."""
    from rlawm_jax.rl.reward_probe import format_markdown, probe
    from rlawm_jax.rl.setup import prepare

    print(format_markdown(probe(prepare(CONFIG.value), DRAWS.value)))


if __name__ == "__main__":
    cli.run(main)
