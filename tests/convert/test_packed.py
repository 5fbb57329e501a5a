"""Packed files: the same model after bfloat16, in less than half of float32's bytes, and nothing from a damaged one."""

import json
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlawm_jax.convert.packed import pack, unpack
from rlawm_jax.policy.checkpoint import load_policy
from rlawm_jax.training.restore import load_world_model
from rlawm_jax.weights.rules import ConversionError


def same_after_bfloat16(state: nnx.State, again: nnx.State) -> None:
    ours, theirs = dict(nnx.to_flat_state(again)), dict(nnx.to_flat_state(state))
    assert ours.keys() == theirs.keys() and ours
    for name, variable in theirs.items():
        value = variable.get_value()
        rounded = value.astype(jnp.bfloat16) if isinstance(variable, nnx.Param) else value
        np.testing.assert_array_equal(ours[name].get_value(), rounded.astype(value.dtype), err_msg=str(name))


def test_a_world_model_is_itself_again_but_for_bfloat16(world_run, tmp_path):
    file = tmp_path / "model.rlawm"
    pack(world_run, file)
    unpack(file, tmp_path / "run")
    (model, config, meta), (before, before_config, before_meta) = map(load_world_model, (tmp_path / "run", world_run))
    same_after_bfloat16(nnx.state(before), nnx.state(model))
    assert config.to_json_best_effort() == before_config.to_json_best_effort()
    for name in ("fingerprint", "trained_parts", "command", "git", "step"):
        assert meta[name] == before_meta[name]
    told = json.loads((tmp_path / "run/packed.json").read_text())
    assert told["step"] == meta["step"] and told["checkpoint"]["versions"] == before_meta["versions"]


def test_a_policy_is_itself_again_but_for_bfloat16(cloned, tmp_path):
    file = tmp_path / "policy.rlawm"
    pack(cloned, file)
    unpack(file, tmp_path / "run")
    (policy, config), (before, before_config) = map(load_policy, (tmp_path / "run", cloned))
    same_after_bfloat16(nnx.state(before), nnx.state(policy))
    assert config.to_json_best_effort() == before_config.to_json_best_effort()
    unpack(file, tmp_path / "elsewhere", world_model="runs/mine")
    assert load_policy(tmp_path / "elsewhere")[1].world_model == "runs/mine"


def test_a_world_model_has_no_world_model(world_run, tmp_path):
    pack(world_run, tmp_path / "model.rlawm")
    with pytest.raises(ValueError, match=r"--world_model: expected it with a policy's file"):
        unpack(tmp_path / "model.rlawm", tmp_path / "run", world_model="runs/mine")


def test_trained_weights_take_three_quarters_of_bfloat16():
    """Their upper bytes are alike: sign and size of numbers near zero."""
    weights = np.random.default_rng(0).normal(0, 0.05, 200_000).astype(jnp.bfloat16)
    words = weights.view(np.uint8).reshape(-1, 2)
    parts = [len(zlib.compress(words[:, i].tobytes(), 9)) for i in (0, 1)]
    assert sum(parts) < 0.75 * weights.nbytes


def damaged(file, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how in ("low", "high"):
        with zipfile.ZipFile(file) as whole:
            place = whole.getinfo(how).header_offset + 40
        content[place] ^= 255
    elif how == "text":
        content = bytearray(b"version https://git-lfs\n")
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "low", "high", "text"])
def test_a_damaged_file_is_refused_in_one_line_and_leaves_nothing(world_run, tmp_path, how):
    file = tmp_path / "model.rlawm"
    pack(world_run, file)
    damaged(file, how)
    with pytest.raises(ConversionError, match=r"model\.rlawm: expected a file written by launch\.pack.*found") as error:
        unpack(file, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_file_or_folder_that_is_not_there_is_named(world_run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/model\.rlawm: expected a file .* found none; correct --file"):
        unpack(tmp_path / "nowhere/model.rlawm", tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"--file: expected a folder .*nowhere to write into, found none"):
        pack(world_run, tmp_path / "nowhere/model.rlawm")


def test_arrays_of_another_version_are_named(world_run, tmp_path):
    file = tmp_path / "model.rlawm"
    pack(world_run, file)
    with zipfile.ZipFile(file) as whole:
        entries = {name: whole.read(name) for name in whole.namelist()}
    meta = json.loads(entries["meta.json"])
    wide = next(row for row in meta["arrays"] if len(row[1]) == 2)
    wide[1] = wide[1][::-1] if wide[1][0] != wide[1][1] else [wide[1][0] * wide[1][1], 1]
    with zipfile.ZipFile(file, "w") as changed:
        for name, content in (entries | {"meta.json": json.dumps(meta).encode()}).items():
            changed.writestr(name, content)
    with pytest.raises(ConversionError, match=rf"expected {wide[0]} of shape .* packed by another version"):
        unpack(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_stays_as_it_is(world_run, tmp_path):
    file, run = tmp_path / "model.rlawm", tmp_path / "run"
    pack(world_run, file)
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a folder that does not exist yet"):
        unpack(file, run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_an_unpacked_world_model_decodes_as_the_rounded_one(world_run, tmp_path):
    file = tmp_path / "model.rlawm"
    pack(world_run, file)
    unpack(file, tmp_path / "run")
    model, before = load_world_model(tmp_path / "run")[0], load_world_model(world_run)[0]
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), nnx.state(before, nnx.Param))
    nnx.update(before, rounded)
    patches = before.grid[0] * before.grid[1]
    width = before.image_decoder.conv_in.kernel[...].shape[2]
    tokens = np.random.default_rng(1).normal(size=(2, patches, width)).astype(np.float32)
    np.testing.assert_array_equal(model.decode(tokens), before.decode(tokens))
