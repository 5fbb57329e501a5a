"""Train any subset of the objectives: python -m launch.train --config=configs/X.py[:variant] --workdir=DIR."""

from absl import flags

from launch import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; training resumes from its newest checkpoint.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    """Prepare the run the flags describe and train it."""
    from rlawm_jax.training.loop import train
    from rlawm_jax.training.setup import prepare

    workdir = cli.run_folder(WORKDIR.value)
    run = prepare(CONFIG.value, workdir)  # open the data, build the model, its optimizers and the step
    train(run, workdir)  # the training loop, in a folder locked by this process


if __name__ == "__main__":
    cli.run(main)
