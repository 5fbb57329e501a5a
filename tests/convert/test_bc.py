# ruff: noqa: E402  what needs torch is imported after it was found
"""BC policies of the release: they act the same here, convert back bit for bit, and are refused as a whole."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")

from configs import base
from configs import policy as recipe
from rlawm_jax.convert.bc import bc_to_release, bc_to_run
from rlawm_jax.convert.normaliser import REMEMBERED
from rlawm_jax.convert.torch_reference import randomise
from rlawm_jax.models.policy import Policy as OurPolicy
from rlawm_jax.policy.actor import Actor
from rlawm_jax.policy.checkpoint import load_policy, save_policy
from rlawm_jax.weights.rules import ConversionError
from tests.convert.torch_policy import Policy
from tests.tiny_models import run

pytestmark = pytest.mark.torch

SIZE = 40
KINDS = {
    "plain": {},
    "state": {"state": 4},
    "after RL": {"residual": (7, 6), "rank": 2},
    "state, after RL": {"state": 4, "residual": (7, 6), "rank": 2},
}


def make(**options) -> Policy:
    theirs = Policy((16, 32), (1, 2), (9, 8), actions=3, horizon=12, **options)
    return randomise(theirs, std=0.2)


def config():
    made = recipe.get_config()
    made.policy.image_size = SIZE
    return made.lock()


def save(theirs: Policy, path: Path) -> Path:
    torch.save(theirs.full_state(), path)
    return path


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(their module, our run folder)."""
    folder = tmp_path_factory.mktemp("bc")
    theirs = make(**KINDS[request.param])
    bc_to_run(save(theirs, folder / "policy.pt"), folder / "run", config(), step=7)
    return theirs, folder / "run"


def test_a_converted_policy_acts_as_in_pytorch(pair):
    theirs, folder = pair
    ours = load_policy(folder)[0]
    rng = np.random.default_rng(0)
    images = rng.random((3, SIZE, SIZE, 3)).astype(np.float32)
    state = rng.normal(size=(3, 4)).astype(np.float32) if hasattr(theirs, "state_encoder") else None
    with torch.no_grad():
        given = torch.from_numpy(images).permute(0, 3, 1, 2)
        rows, features = theirs(given, None if state is None else torch.from_numpy(state))
        offset, scale = (theirs.statistics[f"normalizer.params_dict.action.{name}"] for name in ("offset", "scale"))
        raw = (rows - offset) / scale
    ours_features = run(ours, images, state, method="features")
    np.testing.assert_allclose(ours_features, features, rtol=0, atol=1e-4)
    actions = run(ours, ours_features, method="base_actions")
    np.testing.assert_allclose(actions, rows, rtol=0, atol=1e-4)
    np.testing.assert_allclose(run(ours, actions, method="raw_actions"), raw, rtol=0, atol=2e-4)  # scales down to 0.5
    if hasattr(theirs, "residual_net"):
        with torch.no_grad():
            mean, std = theirs.residual_net.head(theirs.residual_net.backbone(features)).chunk(2, dim=-1)
            mean = rows[:, :8].flatten(1) + 0.1 * mean.tanh()
            std = 0.1 * torch.nn.functional.softplus(std)
        ours_mean, ours_std = run(ours, ours_features, method="distribution")
        np.testing.assert_allclose(ours_mean, mean, rtol=0, atol=1e-4)
        np.testing.assert_allclose(ours_std, std, rtol=0, atol=1e-4)


def test_from_a_frame_of_512_pixels_a_converted_policy_acts_as_in_pytorch(tmp_path):
    theirs, recipe_ = make(), recipe.get_config()
    # resize: a recipe's own choice does not count; raw: without a world model between frame and policy
    recipe_.update({"observation": "raw"})
    recipe_.policy.update({"resize": "antialias"})
    bc_to_run(save(theirs, tmp_path / "policy.pt"), tmp_path / "run", recipe_.lock())
    frames = np.random.default_rng(0).integers(0, 256, (2, 512, 512, 3)).astype(np.uint8)
    with torch.no_grad():
        images = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
        small = torch.nn.functional.interpolate(images, (128, 128), mode="bilinear", align_corners=False)
        rows, _ = theirs(small)
        offset, scale = (theirs.statistics[f"normalizer.params_dict.action.{name}"] for name in ("offset", "scale"))
        expected = ((rows - offset) / scale)[:, :8].numpy()
    actor = Actor.load(tmp_path / "run")
    assert actor.image_size == 512 and actor.config.policy.resize == "release"
    np.testing.assert_allclose(actor.act(frames), expected, rtol=0, atol=2e-4)  # scales down to 0.5
    policy, config_ = load_policy(tmp_path / "run")
    policy.resize = "antialias"
    # on noise, which antialiasing smooths: what the test would find if the mode did not come along
    assert np.abs(Actor(policy, config_, None).act(frames) - expected).max() > 0.02


def test_a_policy_that_saw_other_frames_does_not_go_to_the_release(tmp_path):
    made = recipe.get_config()
    made.policy.update({"action_dim": 2, "resize": "antialias", "widths": (16,), "blocks": (1,), "hidden": (8,)})
    made.observed.image_size = 512
    save_policy(tmp_path / "run", made, OurPolicy(made, rngs=nnx.Rngs(0)), 1)
    with pytest.raises(ValueError, match=r"expected policy\.resize=release, .* 512 to 128 .* found antialias") as error:
        bc_to_release(tmp_path / "run", tmp_path / "back")
    assert "\n" not in str(error.value)
    made.observed.image_size = 128  # nothing is resized
    save_policy(tmp_path / "small", made, OurPolicy(made, rngs=nnx.Rngs(0)), 1)
    bc_to_release(tmp_path / "small", tmp_path / "back")


def test_no_bit_changes_in_a_round_trip(pair, tmp_path):
    theirs, folder = pair
    bc_to_release(folder, tmp_path / "back")
    back = torch.load(tmp_path / "back" / "policy_step0000007.pt", weights_only=True)
    original = theirs.full_state()
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert tensor.numpy().tobytes() == back[name].numpy().tobytes(), name


def test_sizes_are_read_off_the_tensors(pair):
    theirs, folder = pair
    c = load_policy(folder)[1].policy
    assert (c.action_dim, c.horizon, c.executed, tuple(c.widths), tuple(c.blocks)) == (3, 12, 8, (16, 32), (1, 2))
    assert tuple(c.hidden) == (9, 8) and c.state_dim == (4 if hasattr(theirs, "state_encoder") else 0)
    assert c.residual.enabled == hasattr(theirs, "residual_net")


def test_a_policy_without_stored_statistics_converts_back_with_those_its_limits_imply(tmp_path):
    theirs = make()
    bc_to_run(save(theirs, tmp_path / "p.pt"), tmp_path / "run", config())
    (tmp_path / "run" / REMEMBERED).unlink()
    bc_to_release(tmp_path / "run", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "policy_step0000000.pt", weights_only=True)
    assert {name.replace("front_lower_camera", "front_right_camera") for name in back} == set(theirs.full_state())
    low, scale, offset = (back[f"normalizer.params_dict.action.{k}"] for k in ("input_stats.min", "scale", "offset"))
    np.testing.assert_allclose(low * scale + offset, -1, atol=1e-5)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def checkpoint(path: Path, state: dict, **more) -> Path:
    torch.save({"cfg": more, "state_dicts": {"ema_model": state, "model": {}, "optimizer": {}}, "pickles": {}}, path)
    return path


def test_a_pickled_checkpoint_needs_consent_and_still_runs_no_code(tmp_path):
    theirs = make()
    path = checkpoint(tmp_path / "latest_epoch3.ckpt", theirs.full_state(), evil=Evil(tmp_path / "executed"))
    with pytest.raises(ConversionError, match=r"are pickles.*add --allow_pickle if you trust the file"):
        bc_to_run(path, tmp_path / "out", config())
    bc_to_run(path, tmp_path / "out", config(), allow_pickle=True)
    assert not (tmp_path / "executed").exists()
    assert load_policy(tmp_path / "out")[1].policy.action_dim == 3


@pytest.mark.parametrize("content", ["a pickle alone", "a pickle before a checkpoint", "a checkpoint of pickles"])
def test_no_kind_of_pickle_runs_code_with_consent(tmp_path, content):
    evil, path = pickle.dumps(Evil(tmp_path / "executed")), tmp_path / "p.ckpt"
    if content == "a checkpoint of pickles":
        torch.save({"state_dicts": Evil(tmp_path / "executed")}, path)
    else:
        torch.save({"state_dicts": {"model": make().full_state()}}, path)
        path.write_bytes(evil if content == "a pickle alone" else evil + path.read_bytes())
    with pytest.raises(ConversionError, match="expected a policy checkpoint with state_dicts") as error:
        bc_to_run(path, tmp_path / "out", config(), allow_pickle=True)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["p.ckpt"]


def refused(state: dict, tmp_path: Path) -> str:
    torch.save(state, tmp_path / "p.pt")
    with pytest.raises(ConversionError) as error:
        bc_to_run(tmp_path / "p.pt", tmp_path / "out", config())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.pt"]
    return str(error.value)


def test_every_tensor_that_does_not_fit_is_named_in_one_report(tmp_path):
    state = make().full_state()
    eyes = "img_encoder.backbones.front_right_camera"
    del state["decoder.net.3.bias"]
    state[f"{eyes}.layer2.0.bn1.weight"] = torch.zeros(3)
    state[f"{eyes}.conv1.weight"][0] = torch.nan
    state["extra"] = torch.zeros(1)
    text = refused(state, tmp_path)
    for line in ("decoder.net.3.bias: missing", "found (3,)", "conv1.weight: holds NaN", "extra: unexpected"):
        assert line in text


def test_a_normaliser_that_does_not_fit_is_named(tmp_path):
    state = make().full_state()
    state["normalizer.params_dict.action.offset"] = torch.full((3,), torch.nan)
    state["normalizer.params_dict.image.scale"] = torch.tensor([1.0])
    text = refused(state, tmp_path)
    assert "action.offset: holds NaN" in text and "image.scale: expected 2.0" in text


def test_tensors_and_normaliser_are_one_report(tmp_path):
    state = make(state=4).full_state()
    del state["decoder.net.3.bias"], state["normalizer.params_dict.state.scale"]
    state["normalizer.params_dict.state.input_stats.std"][1] = torch.inf
    state["normalizer.params_dict.action.offset"] = torch.zeros(4)
    state["normalizer.params_dict.gripper.scale"] = torch.zeros(1)
    text = refused(state, tmp_path)
    for line in (
        "decoder.net.3.bias: missing",
        "state.scale: missing",
        "state.input_stats.std: holds NaN or infinity",
        "action.offset: expected shape (3,), found (4,)",
        "gripper.scale: unexpected",
    ):
        assert line in text


def test_every_tensor_that_gives_no_size_is_named_in_one_report(tmp_path):
    state = make(state=4, residual=(7, 6), rank=2).full_state()
    state["normalizer.params_dict.action.scale"] = torch.tensor(1.0)
    state["state_encoder.net.0.weight"] = torch.zeros(6)
    state["decoder.net.6.base_layer.weight"] = torch.zeros(0, 8)
    del state["residual_net.backbone.2.weight"]
    text = refused(state, tmp_path)
    for line in (
        "action.scale: expected 1 or more axes to read a size from, found shape ()",
        "state_encoder.net.0.weight: expected 2 or more axes to read a size from, found shape (6,)",
        "decoder.net.6.weight: expected 1 or more axes to read a size from, found shape (0, 8)",
        "residual_net.backbone.2.weight: expected 1 or more axes to read a size from, found none",
    ):
        assert line in text
    for broken in (torch.tensor(1.0), torch.zeros(0), torch.zeros(2, 0, 3), torch.eye(3).to_sparse()):
        assert "state_encoder.net.0.weight: expected " in refused(dict.fromkeys(state, broken), tmp_path)


def test_a_recipe_of_another_model_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"expected a recipe such as configs/policy\.py, found one without policy"):
        bc_to_run(save(make(), tmp_path / "p.pt"), tmp_path / "out", base.get_config())


def test_other_checkpoints_are_refused_by_their_kind(tmp_path):
    assert "found one of BC + RLA" in refused({"learnable_tokens": torch.zeros(1)}, tmp_path)
    assert "with one camera, found none" in refused({"tokens": torch.zeros(1)}, tmp_path)
    state = make().full_state()
    other = {name.replace("front_right", "rear"): tensor for name, tensor in state.items()}
    assert "with one camera, found front_right_camera, rear_camera" in refused(state | other, tmp_path)
    del state["normalizer.params_dict.action.scale"]
    assert "action.scale: expected 1 or more axes to read a size from, found none" in refused(state, tmp_path)
    (tmp_path / "p.pt").unlink()
    (tmp_path / "p.ckpt").write_bytes(b"\x80\x04damaged")
    with pytest.raises(ConversionError, match="expected a policy checkpoint with state_dicts"):
        bc_to_run(tmp_path / "p.ckpt", tmp_path / "out", config(), allow_pickle=True)
