# ruff: noqa: E402  what needs torch is imported after it was found
"""The release's networks at their official width: random in PyTorch, converted, they compute the same here.

Widths, depths and heads are official; frames are 4 x 4 patches, because patches have no weights of their own. The
table of rlawm_jax/convert/README.md: pytest -rP tests/convert/test_official_width.py
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from configs import base
from configs import policy as policy_recipe
from rlawm_jax.convert.bc import bc_to_run
from rlawm_jax.convert.parity import parity
from rlawm_jax.convert.release import KINDS, read_kind
from rlawm_jax.convert.torch_reference import randomise
from rlawm_jax.policy.checkpoint import load_policy
from tests.convert.official import STD, network
from tests.convert.torch_policy import Policy
from tests.tiny_models import run

pytestmark = [pytest.mark.torch, pytest.mark.slow]

BOUND = 1e-4  # the issue's: largest absolute deviation in float32
PARAMETERS = {"encoder": 152_255_552, "decoder": 153_306_112, "flow_model": 349_036_288, "image_decoder": 62_608_643}


def show(kind: str, stages: dict[str, dict[str, float]]) -> None:
    for name, stage in stages.items():
        print(f"| {kind}: {name} | {stage['rms']:.2g} | {stage['float32']:.1e} | {stage['bfloat16']:.1e} |")


def check(stages: dict[str, dict[str, float]]) -> None:
    for name, stage in stages.items():
        assert 0.05 < stage["rms"] < 5, (name, stage)  # of unit scale, and not nothing
        assert stage["float32"] <= BOUND, (name, stage)
        assert BOUND < stage["bfloat16"] < stage["rms"], (name, stage)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_network_computes_what_pytorch_does(kind, tmp_path):
    files, counts = {}, {}
    for name in (part.name for part in KINDS[kind]):
        module = network(name)
        files[name] = tmp_path / f"{name}_step0100000.pt"
        torch.save(module.state_dict(), files[name])
        counts[name] = sum(parameter.numel() for parameter in module.parameters())
        del module
    assert counts == {name: PARAMETERS[name] for name in counts}
    config = base.get_config().lock()
    stages = parity(kind, files, read_kind(kind, files, config), config)
    show(kind, stages)
    check(stages)
    for file in files.values():  # gigabytes, and pytest keeps the folders of three runs
        file.unlink()


def test_a_converted_policy_acts_as_in_pytorch(tmp_path):
    sizes = policy_recipe.get_config().policy
    theirs = Policy(sizes.widths, sizes.blocks, sizes.hidden, actions=8, horizon=12, residual=(512, 256), rank=8)
    torch.save(randomise(theirs, std=STD).full_state(), tmp_path / "policy.pt")
    images = np.random.default_rng(0).random((2, 128, 128, 3), np.float32)
    with torch.no_grad():
        rows, features = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
        mean, std = theirs.residual_net.head(theirs.residual_net.backbone(features)).chunk(2, dim=-1)
        offset, scale = (theirs.statistics[f"normalizer.params_dict.action.{name}"] for name in ("offset", "scale"))
        expected = {
            "features": features,
            "actions": rows,
            "raw actions": (rows - offset) / scale,
            "Gaussian's mean": rows[:, :8].flatten(1) + 0.1 * mean.tanh(),
            "Gaussian's deviation": 0.1 * torch.nn.functional.softplus(std),
        }
    stages = {name: {"rms": float(value.square().mean().sqrt())} for name, value in expected.items()}
    for dtype in ("float32", "bfloat16"):
        config = policy_recipe.get_config()
        config.dtype = dtype
        bc_to_run(tmp_path / "policy.pt", tmp_path / dtype, config.lock())
        ours = load_policy(tmp_path / dtype)[0]
        seen = run(ours, images, None, method="features")
        actions = run(ours, seen, method="base_actions")
        outputs = [seen, actions, run(ours, actions, method="raw_actions"), *run(ours, seen, method="distribution")]
        for stage, theirs_out, ours_out in zip(stages.values(), expected.values(), outputs, strict=True):
            stage[dtype] = float(np.abs(np.asarray(ours_out, np.float32) - theirs_out.numpy()).max())
    show("bc", stages)
    check(stages)
