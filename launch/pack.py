"""A run's parameters as one small file and back: python -m launch.pack --workdir=RUN --file=F, or with --unpack.

Parameters are rounded to bfloat16. --unpack makes the run folder that every other command reads.
"""

from pathlib import Path

from absl import flags

from launch import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of a world model or a policy; with --unpack, one to make.")
FILE = flags.DEFINE_string("file", None, "The packed file.")
UNPACK = flags.DEFINE_bool("unpack", False, "Make the run folder from the file.")
WORLD_MODEL = flags.DEFINE_string(
    "world_model", "", "With --unpack, of a policy: the run folder of its world model, if not where it was trained."
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to pack; the newest by default.", lower_bound=0)
flags.mark_flags_as_required(["workdir", "file"])


def main() -> None:
    """Pack or unpack, and print what came out."""
    from rlawm_jax.convert.packed import pack, unpack

    workdir, file = Path(WORKDIR.value), Path(FILE.value).expanduser()
    if UNPACK.value:
        meta = unpack(file, workdir, world_model=WORLD_MODEL.value)
        print(f"{workdir}: step {meta['step']} of {meta['checkpoint'].get('git', 'unknown')}")
    else:
        if WORLD_MODEL.value:
            raise ValueError("--world_model: expected it with --unpack only, found it without")
        meta = pack(workdir, file, step=STEP.value)
        print(f"{file}: step {meta['step']}, {len(meta['arrays'])} arrays, {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    cli.run(main)
