"""Pool one recipe's training runs over their seeds: python -m launch.compare_runs --runs=RUN,RUN [--against=RUN,RUN].

Every folder must have been evaluated by launch.evaluate_policy with the same --seed and --episodes. Prints a table.
"""

from absl import flags

from launch import cli

RUNS = flags.DEFINE_list("runs", None, "Run folders of one recipe, one per training seed.")
AGAINST = flags.DEFINE_list("against", [], "Run folders of another recipe: adds the difference, paired by seed.")
flags.mark_flag_as_required("runs")


def main() -> None:
    """Read the folders and print the pooled results."""
    from rlawm_jax.evaluation import closed_loop, training_seeds

    if not RUNS.value:
        raise ValueError("--runs: expected at least one run folder, found none")
    if AGAINST.value:
        first = closed_loop.load(RUNS.value[0])
        closed_loop.check_pairing(first.settings["task"], first.seeds, closed_loop.load(AGAINST.value[0]))
    these = training_seeds.load(RUNS.value)
    others = training_seeds.load(AGAINST.value) if AGAINST.value else None
    print(training_seeds.format_markdown(these, others))
    if others:
        print(f"\n{training_seeds.pairing(these, others)}")


if __name__ == "__main__":
    cli.run(main)
