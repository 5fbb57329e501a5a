"""PPO in imagination: python -m launch.train_rl --config=configs/X.py[:variant] --workdir=DIR --config.policy=RUN."""

from absl import flags

from launch import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; learning resumes from its newest checkpoint.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    """Improve the policy that the flags name, inside its world model."""
    from rlawm_jax.rl.loop import train
    from rlawm_jax.rl.setup import prepare

    workdir = cli.run_folder(WORKDIR.value)
    run = prepare(CONFIG.value)  # load policy and world model, open the demonstrations, build the learner
    train(run, workdir)  # imagined returns, the training loop, imagined returns, in a folder locked by this process


if __name__ == "__main__":
    cli.run(main)
