"""Checkpoints of the PyTorch release: computed alike here, converted back bit for bit, or refused as a whole."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from configs import policy
from rlawm_jax.convert.release import KINDS, fill, module_at, read_kind, state_dicts
from rlawm_jax.convert.runs import REPORT, to_release, to_run, whole_folder, write_state_dict
from rlawm_jax.flow import Sampler
from rlawm_jax.models.vit import VARIANTS, VitSpec
from rlawm_jax.training.restore import load_world_model
from rlawm_jax.weights.rules import ConversionError, flat_parameters
from tests.tiny_models import PER_DIMENSION, run, tiny_config, tiny_world

ROOT = Path(__file__).parents[2]
C, WIDTH, K, D = 24, 16, 3, 4  # tokens of another width than the denoiser, so that xt_proj is there
ACTION_DIMS = {"0": 2, "2": 3}
STEP = 20
PARITY = {"rtol": 0, "atol": 1e-4}  # the bound, float32 at unit scale
BACKBONE = VitSpec("dinov2", 14, C, 1, 2, 48, False, 0, True, True, True, 1e-6, 4)


@pytest.fixture(scope="module", autouse=True)
def tiny_variant():
    VARIANTS["tiny"] = BACKBONE
    yield
    del VARIANTS["tiny"]


def config(**overrides):
    sizes = {"rla__depth": 2, "denoiser__cond_depth": 2, "denoiser__flow_depth": 2, "image_decoder__width": 128}
    return tiny_config(**sizes | {"backbone__name": "tiny", "backbone__weights": "random:0"} | overrides)


def world(**overrides):
    return tiny_world(backbone__name="tiny", image_decoder__width=128, **overrides)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def save_release(kind: str, folder: Path, model, model_config) -> dict[str, dict[str, np.ndarray]]:
    """The kind's files of `model` in folder/ckpts, as .safetensors; the tensors by network."""
    (folder / "ckpts").mkdir(parents=True)
    tensors = dict(state_dicts(kind, model, model_config))
    for name, state in tensors.items():
        save_file(state, folder / "ckpts" / f"{name}_step{STEP:07d}.safetensors")
    return tensors


# --- computes the same


@pytest.fixture(scope="module")
def theirs():
    """Random torch modules of the release's layout."""
    pytest.importorskip("torch")
    from rlawm_jax.convert.torch_reference import FlowModel, ImageDecoder, TokenTransformer, randomise

    return {
        "encoder": randomise(TokenTransformer(C, D, K, WIDTH, 2, 2, 4.0), seed=1),
        "decoder": randomise(TokenTransformer(C, C, K, WIDTH, 2, 2, 4.0, latent_dim=D), seed=2),
        "flow_model": randomise(FlowModel(C, D, {0: 2, 2: 3}, WIDTH, 2, 2, 2, 4.0, max_horizon=5), seed=3, std=0.1),
        "image_decoder": randomise(ImageDecoder(C, 128), seed=4, std=0.05),
    }


@pytest.fixture(scope="module")
def release(theirs, tmp_path_factory) -> Path:
    """Their run folders: files as the release names them, with an older step whose name sorts last."""
    import torch

    root = tmp_path_factory.mktemp("release")
    files = {"rla": ("encoder", "decoder"), "denoiser": ("flow_model",), "image_decoder": ("image_decoder",)}
    for kind, names in files.items():
        (root / kind / "ckpts").mkdir(parents=True)
        for name in names:
            # the release's image-decoder runs call their model decoder
            file = "decoder" if name == "image_decoder" else name
            state = theirs[name].state_dict()
            state = {"model_state_dict": state} if kind == "denoiser" else state
            torch.save(state, root / kind / "ckpts" / f"{file}_step{STEP:07d}.pt")
            torch.save({"wrong": torch.zeros(1)}, root / kind / "ckpts" / f"{file}_step9.pt")
    return root


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory) -> Path:
    """One run folder of ours with all three kinds, each conversion inheriting from the one before."""
    root, before = tmp_path_factory.mktemp("converted"), ""
    for kind in ("rla", "denoiser", "image_decoder"):
        to_run(kind, release / kind, root / kind, config(train__init_from=before))
        before = str(root / kind)
    return root / "image_decoder"


@pytest.fixture(scope="module")
def ours(converted):
    return load_world_model(converted)[0]


S0, S1, Z, NOISE = draw(3, 4, C), draw(3, 4, C, seed=1), draw(3, K, D, seed=2), draw(3, K, D, seed=3)
# one short window, one full, one claiming more rows than are kept
ACTIONS, COUNTS, ROBOTS = draw(3, 7, 3, seed=4), np.asarray([1, 5, 7]), np.asarray([0, 2, 2])
TIMES = np.asarray([0.1, 0.5, 0.9], np.float32)


@pytest.mark.torch
def test_converted_encoder_and_decoder_equal_pytorch(ours, theirs):
    import torch

    assert float(ours.latent_scale[...]) == 10
    with torch.no_grad():
        latent = theirs["encoder"](torch.from_numpy(S1 - S0))[:, :K]
        tokens = theirs["decoder"](torch.from_numpy(S0), torch.from_numpy(Z))[:, K:]
    np.testing.assert_allclose(run(ours.rla, S0, S1, method="encode"), latent, **PARITY)
    np.testing.assert_allclose(run(ours.rla, S0, Z, method="decode"), tokens, **PARITY)


def torch_condition(flow_model):
    import torch

    vec = flow_model.action_vec(*map(torch.from_numpy, (ACTIONS, COUNTS, ROBOTS)))
    return flow_model.condition(torch.from_numpy(S0), vec)


@pytest.mark.torch
def test_converted_condition_and_velocity_equal_pytorch(ours, theirs):
    import torch

    flow_model = theirs["flow_model"]
    with torch.no_grad():
        cond = torch_condition(flow_model)
        velocity = flow_model.velocity(torch.from_numpy(NOISE), torch.from_numpy(TIMES), cond)
        packed = [block.cross_attn for block in flow_model.flow_blocks]
        keys = torch.stack([cond @ a.in_proj_weight[WIDTH:-WIDTH].T + a.in_proj_bias[WIDTH:-WIDTH] for a in packed])
    condition = run(ours.denoiser, S0, ACTIONS, COUNTS, ROBOTS, method="condition")
    np.testing.assert_allclose(condition.keys_values[0].reshape(keys.shape), keys, **PARITY)
    np.testing.assert_allclose(run(ours.denoiser, NOISE, TIMES, condition, method="velocity"), velocity, **PARITY)


@pytest.mark.torch
def test_converted_thirty_step_sample_equals_pytorch(ours, theirs):
    import torch

    with torch.no_grad():
        cond, x = torch_condition(theirs["flow_model"]), torch.from_numpy(NOISE)
        for i in range(30):
            x = x - theirs["flow_model"].velocity(x, torch.full((3,), 1 - i / 30), cond) / 30
        expected = theirs["decoder"](torch.from_numpy(S0), 10 * x)[:, K:]
    graphdef, state = nnx.split(ours)

    @jax.jit
    def predict(state):
        return nnx.merge(graphdef, state).predict(S0, ACTIONS, COUNTS, ROBOTS, NOISE, Sampler("euler", 30))

    tokens, latent = predict(state)
    np.testing.assert_allclose(latent, x, **PARITY)
    np.testing.assert_allclose(tokens, expected, **PARITY)


@pytest.mark.torch
def test_converted_image_decoder_equals_pytorch(ours, theirs):
    import torch

    with torch.no_grad():
        decoded = theirs["image_decoder"](torch.from_numpy(S0), (2, 2))
        # ours has patches of 14 pixels in this test
        decoded = torch.nn.functional.interpolate(decoded, (28, 28), mode="bilinear").permute(0, 2, 3, 1)
    np.testing.assert_allclose(run(ours.image_decoder, S0), decoded, **PARITY)


@pytest.mark.torch
def test_a_converted_run_records_its_contents_and_origin(converted, release):
    _, run_config, meta = load_world_model(converted)
    assert meta["step"] == STEP
    assert meta["trained_parts"] == ["image_decoder", "rla", "denoiser"]
    assert run_config.objectives.image_decoder.enabled and not run_config.objectives.rla.enabled
    report = json.loads((converted.parent / "rla" / f"{REPORT}.json").read_text())
    assert report["from"] == [str(release / "rla" / "ckpts" / f"{n}_step{STEP:07d}.pt") for n in ("encoder", "decoder")]
    assert report["taken_from_config"] == {"rla.heads": 2, "rla.input_mode": "sub", "rla.decoder_only": False}
    assert report["backbone"]["fingerprint"] == meta["fingerprint"]
    page = (converted.parent / "rla" / f"{REPORT}.md").read_text()
    for path, network in report["networks"].items():
        assert f"| {path} | {network['parameters']:,} | `{network['fingerprint']}` |" in page


# --- goes back bit for bit


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_loads_strictly_in_pytorch_with_no_bit_changed(kind, converted, theirs, tmp_path):
    import torch

    to_release(kind, converted, tmp_path / "back")
    for network in KINDS[kind]:
        stem = tmp_path / "back" / f"{network.name}_step{STEP:07d}"
        state, original = torch.load(f"{stem}.pt", weights_only=True), theirs[network.name].state_dict()
        theirs[network.name].load_state_dict(state, strict=True)
        tensors = load_file(f"{stem}.safetensors")
        assert state.keys() == original.keys() == tensors.keys()
        for name, tensor in original.items():
            assert tensor.numpy().tobytes() == state[name].numpy().tobytes() == tensors[name].tobytes(), name


@pytest.mark.parametrize("overrides", [{}, {"denoiser__width": C}])  # with and without xt_proj
@pytest.mark.parametrize("kind", KINDS)
def test_our_parameters_survive_a_round_trip_bit_for_bit(kind, overrides, tmp_path):
    model = world(**overrides)
    own = tiny_config(backbone__name="tiny", image_decoder__width=128, **overrides)
    tensors = save_release(kind, tmp_path, model, own)
    files = {name: tmp_path / "ckpts" / f"{name}_step{STEP:07d}.safetensors" for name in tensors}
    for path, leaves in read_kind(kind, files, own).items():
        expected = flat_parameters(module_at(model, path))
        assert leaves.keys() == expected.keys()
        assert all(leaves[leaf].tobytes() == np.asarray(value).tobytes() for leaf, value in expected.items())


def test_action_statistics_are_folded_into_weights_that_read_raw_rows(tmp_path):
    model, raw = world(), world(seed=1)
    for encoder in model.denoiser.action_encoders.values():
        encoder.scale[...] = encoder.scale[...] / 256
        encoder.offset[...] = encoder.offset[...] - 1
    own = tiny_config(backbone__name="tiny", image_decoder__width=128)
    save_release("denoiser", tmp_path, model, own)
    files = {"flow_model": tmp_path / "ckpts" / f"flow_model_step{STEP:07d}.safetensors"}
    fill(raw.denoiser, read_kind("denoiser", files, own)["denoiser"])
    rows = 256 + 256 * ACTIONS
    expected, got = (run(m.denoiser, rows, COUNTS, ROBOTS, method="encode_actions") for m in (model, raw))
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


# --- refused as a whole


def refused(kind: str, source: Path, tmp_path: Path, model_config, error=ConversionError) -> str:
    """The message of a conversion that fails, after which nothing is left of its output."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error) as caught:
        to_run(kind, source, tmp_path / "out", model_config)
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value)


@pytest.fixture
def rla_files(tmp_path) -> Path:
    save_release("rla", tmp_path / "rla", world(rla__depth=2), config())
    return tmp_path / "rla"


def test_every_tensor_that_does_not_fit_is_named_in_one_report(rla_files, tmp_path):
    encoder, decoder = (rla_files / "ckpts" / f"{n}_step{STEP:07d}.safetensors" for n in ("encoder", "decoder"))
    tensors = load_file(encoder)
    del tensors["blocks.1.attn.in_proj_bias"]
    tensors["blocks.0.extra"] = np.zeros(1, np.float32)
    tensors["norm_out.weight"] = np.zeros((7,), np.float32)
    save_file(tensors, encoder)
    tensors = load_file(decoder)
    tensors["out_layer.bias"][2] = np.nan
    tensors["input_layer.bias"] = tensors["input_layer.bias"].astype(np.float64)
    save_file(tensors, decoder)
    text = refused("rla", rla_files, tmp_path, config())
    for line in (
        f"{encoder} as encoder: 3 tensors do not fit",
        "blocks.1.attn.in_proj_bias: missing",
        "blocks.0.extra: unexpected",
        "norm_out.weight: expected shape (16,), found (7,)",
        f"{decoder} as decoder: 2 tensors do not fit",
        "out_layer.bias: holds NaN or infinity",
        "input_layer.bias: expected float32 or a narrower float, found float64",
    ):
        assert line in text


def test_every_setting_that_contradicts_the_tensors_is_named_in_one_report(rla_files, tmp_path):
    other = config(rla__num_tokens=5, rla__token_dim=8, rla__width=32, rla__depth=3, rla__mlp_ratio=2.0)
    text = refused("rla", rla_files, tmp_path, other)
    for line in (
        "config.rla.num_tokens: expected 3 (tokens is [3, 16]), found 5",
        "config.rla.token_dim: expected 4 (token_proj.weight is [16, 4]), found 8",
        "config.rla.width: expected 16 (tokens is [3, 16]), found 32",
        "config.rla.depth: expected 2 (the last block is blocks.1), found 3",
        "config.rla.mlp_ratio: expected 4.0 (blocks.0.mlp.0.weight is [64, 16]), found 2.0",
    ):
        assert line in text
    with other.unlocked():
        other.backbone.name = "dinov2_vits14"
    text = refused("rla", rla_files, tmp_path, other)
    assert "config.backbone.name: expected one of width 24" in text and "found dinov2_vits14 of width 384" in text


def test_a_setting_and_the_tensors_that_do_not_fit_are_one_report(rla_files, tmp_path):
    path = rla_files / "ckpts" / f"encoder_step{STEP:07d}.safetensors"
    tensors = load_file(path)
    tensors["tokens"] = tensors["tokens"][:, :5].copy()  # gives two sizes away
    tensors["norm_out.bias"][0] = np.nan
    save_file(tensors, path)
    text = refused("rla", rla_files, tmp_path, config())
    for line in (
        "config.rla.width: expected 5 (tokens is [3, 5]), found 16",
        "tokens: expected shape (3, 16), found (3, 5)",
        "norm_out.bias: holds NaN or infinity",
    ):
        assert f"\n  {line}" in text


def test_other_robots_are_refused_by_the_width_of_their_rows(tmp_path):
    save_release("denoiser", tmp_path / "source", world(), tiny_config())
    text = refused("denoiser", tmp_path / "source", tmp_path, config(denoiser__action_dims={"0": 9}))
    assert "config.denoiser.action_dims: expected {'0': 2, '2': 3}" in text
    assert "config.denoiser.cond_depth: expected 1 (the last block is cond_blocks.0), found 2" in text


def test_a_checkpoint_of_another_kind_is_named(rla_files, tmp_path):
    encoder = rla_files / "ckpts" / f"encoder_step{STEP:07d}.safetensors"
    text = refused("denoiser", encoder, tmp_path, config())
    assert text == f"{encoder}: expected a checkpoint of kind denoiser, found one of kind rla; --kind=rla"
    text = refused("image_decoder", rla_files, tmp_path, config())  # its decoder goes by the same name
    assert text.endswith("expected a checkpoint of kind image_decoder, found one of kind rla; --kind=rla")
    save_file({"conv1.weight": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    text = refused("denoiser", tmp_path / "other.safetensors", tmp_path, config())
    assert text.endswith("expected the tensors of a denoiser of the release, found conv1.weight")


def test_a_truncated_file_is_one_line(rla_files, tmp_path):
    path = rla_files / "ckpts" / f"decoder_step{STEP:07d}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    text = refused("rla", rla_files, tmp_path, config())
    assert f"{path}: not a complete safetensors file" in text and "\n" not in text


@pytest.mark.torch
def test_a_pickle_payload_is_never_executed_and_every_file_is_one_line(rla_files, tmp_path):
    import torch

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for file in list((rla_files / "ckpts").iterdir()):
        file.rename(file.with_name(f"{file.stem}.safetensors.old"))
        torch.save({"tokens": Payload()}, file.with_suffix(".pt"))
    text = refused("rla", rla_files, tmp_path, config())
    lines = text.splitlines()
    assert len(lines) == len(list((rla_files / "ckpts").glob("*.pt")))
    assert all("holds pickled objects, and reading them would run code" in line for line in lines)
    assert not (tmp_path / "executed").exists()


def test_absent_files_and_steps_are_named(rla_files, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"encoder_step0000007\.pt and decoder_step0000007\.pt of the same step"
    ):
        to_run("rla", rla_files, tmp_path / "out", config(), step=7)
    (rla_files / "ckpts" / f"decoder_step{STEP:07d}.safetensors").rename(rla_files / "ckpts" / "decoder_step3.pt")
    text = refused("rla", rla_files, tmp_path, config(), FileNotFoundError)
    assert f"found decoder_step3.pt, encoder_step{STEP:07d}.safetensors" in text
    text = refused("rla", tmp_path / "absent", tmp_path, config(), FileNotFoundError)
    assert "expected a folder with encoder_step*.pt and decoder_step*.pt" in text


def test_a_folder_that_is_not_empty_is_not_overwritten(rla_files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert "expected a folder that does not exist yet" in refused("rla", rla_files, tmp_path, config(), FileExistsError)
    assert (tmp_path / "out" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "overrides", "line"),
    [
        ("rla", {"rla__decoder_output": "residual"}, "config.rla.decoder_output: expected 'absolute'"),
        ("denoiser", {"denoiser__token_embedding": True}, "config.denoiser.token_embedding: expected False"),
        ("denoiser", {"denoiser__action_in_flow": True}, "config.denoiser.action_in_flow: expected False"),
        ("denoiser", {"latent_scale__value": 3.0}, "latent scale: expected the release's constant 10.0, found 3"),
        ("rla", PER_DIMENSION, "latent scale: expected the release's constant 10.0, found a mean and deviation per "),
        ("image_decoder", {"image_decoder__width": 64}, "config.image_decoder.width: expected a multiple of 128"),
        ("image_decoder", {"image_decoder__stages": 3}, "config.image_decoder.stages: expected 4, .* found 3"),
    ],
)
def test_settings_that_the_release_cannot_represent_are_refused_when_converting_back(kind, overrides, line):
    overrides = {"backbone__name": "tiny"} | overrides
    with pytest.raises(ValueError, match=line):
        list(state_dicts(kind, tiny_world(**overrides), tiny_config(**overrides)))


@pytest.mark.torch
def test_a_part_that_was_not_trained_is_not_converted_back(converted, tmp_path):
    with pytest.raises(ValueError, match="expected a trained denoiser, found rla only"):
        to_release("denoiser", converted.parent / "rla", tmp_path / "out")
    assert not any(tmp_path.iterdir())


# --- the command


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "launch.convert", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_command_converts_both_ways(tmp_path):
    model_config = tiny_config()
    tensors = save_release("rla", tmp_path / "release", tiny_world(), model_config)
    parts = {part: model_config[part] for part in ("rla", "denoiser", "image_decoder")}
    sizes = [
        f"--config.{part}.{field}={value}"
        for part, settings in parts.items()
        for field, value in settings.items()
        if field in ("num_tokens", "token_dim", "width", "depth", "heads", "cond_depth", "flow_depth")
    ]
    base = ["--config=configs/base.py", "--config.backbone.name=dinov2_vits14", "--config.backbone.weights=random:0"]
    size = "--config.backbone.image_size=28"
    there = ["--kind=rla", f"--source={tmp_path / 'release'}", f"--output={tmp_path / 'run'}"]
    done = command(*there, *base, size, *sizes)
    assert done.returncode == 0, done.stderr
    assert f"rla: step {STEP}, " in done.stderr and "weights do not determine rla.heads=2" in done.stderr
    done = command("--kind=rla", "--to=torch", f"--source={tmp_path / 'run'}", f"--output={tmp_path / 'back'}")
    assert done.returncode == 0, done.stderr
    for name, state in tensors.items():
        back = load_file(tmp_path / "back" / f"{name}_step{STEP:07d}.safetensors")
        assert all(back[key].tobytes() == tensor.tobytes() for key, tensor in state.items())
    assert f"rla.encoder: {sum(t.size for t in tensors['encoder'].values()):,} parameters" in done.stdout


def test_backbones_need_no_conversion_is_one_line(tmp_path):
    done = command("--kind=dinov3", "--source=weights", f"--output={tmp_path / 'out'}")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --kind=dinov3: published backbones are read as")


@pytest.mark.torch
def test_the_report_states_parity_by_stage_and_what_bfloat16_costs(release, tmp_path):
    stages = {
        "rla": {"encoder", "decoder"},
        "denoiser": {"action vector", "condition (keys)", "velocity", "30-step sample"},
        "image_decoder": {"frame"},
    }
    for kind, expected in stages.items():
        report = to_run(kind, release / kind, tmp_path / kind, config(), compare=True)
        stages = report["parity"][kind]
        assert stages.keys() == expected
        assert max(stage["bfloat16"] for stage in stages.values()) > 1e-4
        for name, stage in stages.items():
            assert stage["rms"] > 0.01 and stage["float32"] <= 1e-4 and stage["bfloat16"] < stage["rms"], name
            line = f"| {name} | {stage['rms']:.2g} | {stage['float32']:.1e} | {stage['bfloat16']:.1e} |"
            assert line in (tmp_path / kind / f"{REPORT}.md").read_text()


@pytest.mark.torch
def test_pt_files_that_are_truncated_or_hold_no_dense_tensors_are_one_line_each(theirs, tmp_path):
    import torch

    whole, path = theirs["flow_model"].state_dict(), tmp_path / "flow_model_step0000001.pt"
    torch.save(whole, path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-30], b"", b"PK"):
        path.write_bytes(damaged)
        text = refused("denoiser", path, tmp_path, config())
        assert text.startswith(f"{path}: not a complete") and "\n" not in text, text
    torch.save(whole | {"flow_norm_out.bias": torch.eye(16).to_sparse()}, path)
    text = refused("denoiser", path, tmp_path, config())
    assert "\n  flow_norm_out.bias: expected a dense tensor of numbers" in text and len(text.splitlines()) == 2
    torch.save({0: torch.zeros(1)}, path)
    assert "expected a state_dict of tensors" in refused("denoiser", path, tmp_path, config())


def test_every_damaged_file_is_named_in_one_report(rla_files, tmp_path):
    encoder, decoder = (rla_files / "ckpts" / f"{n}_step{STEP:07d}.safetensors" for n in ("encoder", "decoder"))
    encoder.write_bytes(encoder.read_bytes()[:-100])
    save_file({"conv1.weight": np.zeros(1, np.float32)}, decoder)
    text = refused("rla", rla_files, tmp_path, config())
    assert [line.split(": ")[0] for line in text.splitlines()] == [str(encoder), str(decoder)]


def test_every_tensor_that_cannot_be_read_is_named_in_one_report(rla_files, tmp_path):
    path = rla_files / "ckpts" / f"encoder_step{STEP:07d}.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name in ("tokens", "norm_out.weight"):  # a dtype that numpy lacks, of a tensor whose shape gives a size too
        begin, end = header[name]["data_offsets"]
        header[name] |= {"dtype": "F8_E4M3", "shape": [end - begin]}
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])
    text = refused("rla", rla_files, tmp_path, config())
    assert f"{path} as encoder: 2 tensors do not fit" in text
    for name in ("tokens", "norm_out.weight"):
        assert f"\n  {name}: expected a dense tensor of numbers, found" in text


def test_a_recipe_of_another_model_is_one_line(rla_files, tmp_path):
    text = refused("rla", rla_files, tmp_path, policy.get_config(), ValueError)
    assert text.startswith("--config: expected a recipe such as configs/base.py, found one without backbone, rla")


KILLED = """
import os, signal, sys
from pathlib import Path
from rlawm_jax.convert.runs import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_the_remains_of_a_killed_conversion_are_removed_by_the_next(rla_files, tmp_path, capsys):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], cwd=ROOT, timeout=300, check=False)
    assert killed.returncode == -9 and not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "deep" / "half").exists()
    to_run("rla", rla_files, tmp_path / "out", config())
    assert "removing the remains of an interrupted conversion" in capsys.readouterr().err
    assert load_world_model(tmp_path / "out")[2]["trained_parts"] == ["rla"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rla"] and not list(tmp_path.rglob("half"))


def test_two_conversions_into_one_folder_exclude_each_other(tmp_path):
    with whole_folder(tmp_path / "out") as first:
        (first / "first").write_text("whole")
        with pytest.raises(ConversionError, match="expected no other conversion into it, found one running in"):
            whole_folder(tmp_path / "out").__enter__()
        assert (first / "first").read_text() == "whole"
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "first"]


def test_a_folder_that_was_filled_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(ConversionError, match=r"expected to write .*out, found: .*not empty"):  # noqa: SIM117
        with whole_folder(tmp_path / "out") as partial:
            (partial / "new").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").write_text("mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "deep" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(ConversionError, match="--output: expected to write ") as caught:
            whole_folder(output).__enter__()
        assert "\n" not in str(caught.value)
    for fails in (write_state_dict, lambda stem, tensors: write_full(stem)):
        with pytest.raises(ConversionError, match="nothing was left there"), whole_folder(tmp_path / "out") as partial:
            fails(partial / "absent" / "stem", {"a": np.zeros(1, np.float32)})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def write_full(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_an_output_that_is_a_link_is_written_at_its_target(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "there")
    with whole_folder(tmp_path / "out") as partial:
        (partial / "new").write_text("new")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "there" / "new").read_text() == "new"


def test_parent_folders_of_a_failed_output_are_not_left(rla_files, tmp_path):
    with pytest.raises(ConversionError):
        to_run("denoiser", rla_files / "ckpts" / f"encoder_step{STEP:07d}.safetensors", tmp_path / "a" / "b", config())
    assert not (tmp_path / "a").exists()
