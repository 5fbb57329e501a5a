"""PyTorch checkpoints to ours: python -m launch.convert --kind=K --source=S --output=O --config=C; back: --to=torch."""

from pathlib import Path

from absl import flags

from launch import cli

BACKBONES = ("dinov2", "dinov3")

CONFIG = cli.define_config()
KIND = flags.DEFINE_enum("kind", None, [*BACKBONES, "rla", "denoiser", "image_decoder"], "What the checkpoint holds.")
SOURCE = flags.DEFINE_string(
    "source", None, "Release run folder, or a single file of a denoiser or image decoder; --to=torch: our run folder."
)
OUTPUT = flags.DEFINE_string("output", None, "Folder to make: a run folder, or state_dicts with --to=torch.")
TO = flags.DEFINE_enum("to", "jax", ["jax", "torch"], "Direction; torch writes .safetensors and .pt.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to convert; the highest number by default.", lower_bound=0)
flags.mark_flags_as_required(["kind", "source", "output"])


def main() -> None:
    """Convert, and say what was converted."""
    from rlawm_jax.convert.runs import REPORT, to_release, to_run

    kind, source, output = KIND.value, Path(SOURCE.value).expanduser(), Path(OUTPUT.value).expanduser()
    if kind in BACKBONES:
        raise ValueError(
            f"--kind={kind}: published backbones are read as they are; give the file or folder as "
            f"--config.backbone.weights={source} instead of converting it"
        )
    if TO.value == "torch":
        report = to_release(kind, source, output, step=STEP.value)
    elif CONFIG.value is None:
        raise ValueError("--config: expected the recipe the checkpoint belongs to, such as configs/base.py, found none")
    else:
        report = to_run(kind, source, output, CONFIG.value, step=STEP.value)
    for path, network in report["networks"].items():
        print(f"{path}: {network['parameters']:,} parameters, fingerprint {network['fingerprint']}")
    print(output / f"{REPORT}.md")


if __name__ == "__main__":
    cli.run(main)
