"""PyTorch checkpoints to ours: python -m launch.convert --kind=K --source=S --output=O --config=C; back: --to=torch.

--kind=release takes a world model's run folder with its config.yaml and finds the RLA and image decoder runs it names;
--kind=lpips builds the LPIPS weights from the VGG-16 and heads files (--source=vgg16.pth,vgg.pth);
--kind=bc takes a policy (.ckpt with --allow_pickle, .pt or .safetensors).
"""

from pathlib import Path
from typing import Any

from absl import flags

from launch import cli

BACKBONES = ("dinov2", "dinov3")

CONFIG = cli.define_config()
NETWORKS = ("rla", "denoiser", "image_decoder")
KINDS = (*BACKBONES, "release", *NETWORKS, "bc", "lpips")
KIND = flags.DEFINE_enum("kind", None, KINDS, "What the source holds; release: a run folder with its config.yaml.")
SOURCE = flags.DEFINE_list(
    "source",
    None,
    "Release run folder, or a single file of a denoiser or image decoder; release: further run folders after a comma; "
    "lpips: VGG-16 and the LPIPS heads; --to=torch: our run folder.",
)
OUTPUT = flags.DEFINE_string("output", None, "Folder to make: a run folder, or state_dicts with --to=torch.")
TO = flags.DEFINE_enum("to", "jax", ["jax", "torch"], "Direction; torch writes .safetensors and .pt.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to convert; the highest number by default.", lower_bound=0)
ALLOW_PICKLE = flags.DEFINE_bool("allow_pickle", False, "bc: open a .ckpt, a pickle; its objects stay placeholders.")
PARITY = flags.DEFINE_bool("parity", True, "Compare with PyTorch, stage by stage, where torch is installed.")
flags.mark_flags_as_required(["kind", "source", "output"])


def main() -> None:
    """Convert, and print what was converted."""
    kind, output = KIND.value, Path(OUTPUT.value).expanduser()
    sources = [Path(source).expanduser() for source in SOURCE.value]
    if not sources:
        raise ValueError("--source: expected a folder or file, found nothing")
    if kind in BACKBONES:
        raise ValueError(
            f"--kind={kind}: published backbones are read as they are; give the file or folder as "
            f"--config.backbone.weights={sources[0]} instead of converting it"
        )
    if kind not in ("release", "lpips") and len(sources) != 1:
        raise ValueError(f"--source: expected one folder or file for --kind={kind}, found {len(sources)}")
    report = _to_torch(kind, sources, output) if TO.value == "torch" else _to_ours(kind, sources, output)
    for path, network in report["networks"].items():
        print(f"{path}: {network['parameters']:,} parameters, fingerprint {network['fingerprint']}")
    print(output / "conversion_report.md")


def _to_ours(kind: str, sources: list[Path], output: Path) -> dict[str, Any]:
    from configs import base, policy
    from rlawm_jax.convert.bc import bc_to_run
    from rlawm_jax.convert.lpips import to_lpips
    from rlawm_jax.convert.release_run import release_to_run
    from rlawm_jax.convert.runs import to_run

    if kind == "lpips":
        return to_lpips(sources, output)
    if kind == "bc":
        recipe = CONFIG.value or policy.get_config()
        return bc_to_run(sources[0], output, recipe, step=STEP.value, allow_pickle=ALLOW_PICKLE.value)
    if CONFIG.value is None:
        raise ValueError("--config: expected the recipe the checkpoint belongs to, such as configs/base.py, found none")
    if kind == "release":
        official = base.get_config()
        return release_to_run(sources, output, CONFIG.value, official=official, step=STEP.value, compare=PARITY.value)
    return to_run(kind, sources[0], output, CONFIG.value, step=STEP.value, compare=PARITY.value)


def _to_torch(kind: str, sources: list[Path], output: Path) -> dict[str, Any]:
    from rlawm_jax.convert.bc import bc_to_release
    from rlawm_jax.convert.runs import to_release

    if kind == "bc":
        return bc_to_release(sources[0], output, step=STEP.value)
    if kind not in NETWORKS:
        raise ValueError(f"--to=torch: expected --kind={', '.join(NETWORKS)} or bc, one at a time, found {kind}")
    return to_release(kind, sources[0], output, step=STEP.value)


if __name__ == "__main__":
    cli.run(main)
