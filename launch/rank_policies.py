"""Does imagination rank policies as the simulator does? python -m launch.rank_policies --runs=RL,RL --clones=BC,BC.

Prints imagined return and real outcomes of every policy, and Spearman's rank correlation of the two.
"""

from absl import flags

from launch import cli

RUNS = flags.DEFINE_list("runs", None, "Run folders of launch.train_rl, evaluated by launch.evaluate_policy.")
CLONES = flags.DEFINE_list("clones", None, "For each of them the clone that it began from, evaluated too.")
flags.mark_flags_as_required(["runs", "clones"])


def main() -> None:
    """Read the folders and print the table."""
    from rlawm_jax.evaluation import ranking

    if not RUNS.value:
        raise ValueError("--runs: expected at least one run folder, found none")
    print(ranking.format_markdown(ranking.load(RUNS.value, CLONES.value)))


if __name__ == "__main__":
    cli.run(main)
