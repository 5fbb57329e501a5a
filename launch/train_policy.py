"""Clone demonstrations: python -m launch.train_policy --config=configs/X.py --workdir=DIR --config.world_model=RUN."""

import dataclasses
import json

from absl import flags

from launch import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; training resumes from its newest checkpoint.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    """Clone the demonstrations that the flags describe, then score the policy on held-out ones."""
    from rlawm_jax.evaluation.training_seeds import VALIDATION_FILE
    from rlawm_jax.policy.cloning import prepare_policy, validate
    from rlawm_jax.run_folder.logging import announce
    from rlawm_jax.training.loop import train

    workdir = cli.run_folder(WORKDIR.value)
    run = prepare_policy(CONFIG.value, workdir)  # choose episodes, decode their frames, build the policy and the step
    train(run, workdir)  # the training loop, in a folder locked by this process
    validation = validate(run)
    if validation is None:
        announce("no episode is held out (config.data.val_episodes): the policy was not validated")
        return
    scores = {name: dataclasses.asdict(estimate) for name, estimate in validation._asdict().items()}
    (workdir / VALIDATION_FILE).write_text(json.dumps(scores, indent=1) + "\n")
    print(f"action MSE on {validation.policy.clusters} held-out episodes, normalised, mean and 95 % interval:")
    for name, e in validation._asdict().items():
        print(f"  {name.replace('_', ' '):12} {e.value:.4f} [{e.low:.4f}, {e.high:.4f}]")


if __name__ == "__main__":
    cli.run(main)
