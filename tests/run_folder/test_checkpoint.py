"""Checkpoints: what goes in comes out bit for bit, and what does not fit is refused in one line."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rlawm_jax.run_folder import checkpoint
from rlawm_jax.run_folder.checkpoint import FROZEN, STATE, Checkpointer, CheckpointError

DATA = {"grain": {"next_index": 3}, "num_workers": 0}
META = {"fingerprint": "abc", "config": "{}"}


def state(step: int = 3) -> dict:
    """A nested tree with the dtypes of a run."""
    rng = np.random.default_rng(step)
    return {
        "step": jnp.asarray(step, jnp.int32),
        "params": {"kernel": jnp.asarray(rng.normal(size=(64, 8)), jnp.float32), "bias": jnp.zeros(8)},
        "tokens": jnp.asarray(rng.normal(size=(4,)), ml_dtypes.bfloat16),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run folder with checkpoints of steps 3 and 6."""
    checkpoints = Checkpointer(tmp_path, keep=2)
    for step in (3, 6):
        checkpoints.save(step, state(step), {"scale": jnp.ones(2)}, DATA, META)
    checkpoints.close()
    return tmp_path


def test_what_was_saved_comes_back_bit_for_bit(saved):
    checkpoints = Checkpointer(saved, read_only=True)
    assert checkpoints.steps == [3, 6]
    assert checkpoints.latest() == 6
    restored = checkpoints.arrays(6, **{STATE: abstract(state()), FROZEN: abstract({"scale": jnp.ones(2)})})
    for left, right in zip(jax.tree.leaves(restored[STATE]), jax.tree.leaves(state(6)), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert checkpoints.data(6) == DATA
    assert checkpoints.meta(3) == META


def test_arrays_may_be_deleted_as_soon_as_save_returns(tmp_path):
    checkpoints, tree = Checkpointer(tmp_path), state()
    checkpoints.save(1, tree, tree, DATA, META)
    expected = abstract(tree)
    jax.tree.map(lambda x: x.delete(), tree)  # what donation to the next step does
    checkpoints.wait()
    np.testing.assert_array_equal(
        checkpoints.arrays(1, state=expected)[STATE]["params"]["kernel"], state()["params"]["kernel"]
    )
    checkpoints.close()


def test_only_the_newest_are_kept(saved):
    checkpoints = Checkpointer(saved, keep=2)
    checkpoints.save(9, state(9), state(9), DATA, META)
    checkpoints.wait()
    assert checkpoints.steps == [6, 9]
    checkpoints.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"tokens": jnp.zeros(4)}, r"tokens is \(\(4,\), 'bfloat16'\), expected \(\(4,\), 'float32'\)"),
        (
            lambda t: t | {"step": jnp.zeros((), jnp.float32)},
            r"step is \(\(\), 'int32'\), expected \(\(\), 'float32'\)",
        ),
        (
            lambda t: t | {"params": {"kernel": jnp.zeros((64, 9)), "bias": jnp.zeros(8)}},
            r"params/kernel is \(\(64, 8\)",
        ),
        (lambda t: t | {"more": jnp.zeros(1)}, "missing more"),
        (lambda t: {k: v for k, v in t.items() if k != "tokens"}, "unexpected tokens"),
    ],
    ids=["dtype", "integer", "shape", "missing", "unexpected"],
)
def test_another_dtype_shape_or_name_is_refused(saved, change, message):
    with pytest.raises(CheckpointError, match=rf"{saved}.*state does not fit this config: {message}") as error:
        Checkpointer(saved, read_only=True).arrays(6, state=abstract(change(state())))
    assert "use the config of the run, or another --workdir" in assert_one_line(error)


def files_of(folder: Path) -> list[Path]:
    """Every file with something in it, the largest first."""
    return sorted(
        (p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 1), key=lambda p: -p.stat().st_size
    )


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("item", ["state", "data", "meta"])
@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
def test_nothing_is_read_from_a_damaged_checkpoint(saved, item, damage):
    victim = files_of(saved / "checkpoints" / "6" / item)[0]
    damage(victim)
    checkpoints = Checkpointer(saved, read_only=True)
    read = {"state": lambda: checkpoints.arrays(6, state=abstract(state()))}
    with pytest.raises(CheckpointError, match=rf"checkpoint {saved}/checkpoints/6: expected the files of") as error:
        read.get(item, lambda: getattr(checkpoints, item)(6))()
    text = assert_one_line(error)
    assert str(victim.relative_to(saved / "checkpoints" / "6")) in text
    assert "delete that folder to resume from an older checkpoint ([3, 6])" in text
    assert checkpoints.arrays(3, state=abstract(state()))[STATE]["step"] == 3


def test_every_file_is_covered_by_the_checksums(saved):
    for victim in files_of(saved / "checkpoints" / "6"):
        original = victim.read_bytes()
        flip_bit(victim)
        with pytest.raises(CheckpointError):
            Checkpointer(saved, read_only=True).meta(6)
        victim.write_bytes(original)
    assert Checkpointer(saved, read_only=True).meta(6) == META


def test_a_damaged_newest_checkpoint_is_reported_skipped_and_moved_aside(saved, capsys):
    victim = files_of(saved / "checkpoints" / "6" / "state")[0]
    flip_bit(victim)
    assert Checkpointer(saved, read_only=True).latest_intact() == 3
    assert (saved / "checkpoints" / "6").is_dir(), "read-only access moves nothing"
    checkpoints = Checkpointer(saved)
    assert checkpoints.latest_intact() == 3
    log = capsys.readouterr().err
    assert f"DAMAGED CHECKPOINT {saved}/checkpoints/6" in log and victim.name in log and "6.damaged" in log
    assert checkpoints.steps == [3]
    checkpoints.save(6, state(6), {"scale": jnp.ones(2)}, DATA, META)  # the run reaches this step again
    checkpoints.close()
    assert Checkpointer(saved, read_only=True).latest_intact() == 6


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_silently(saved):
    for step in (3, 6):
        flip_bit(files_of(saved / "checkpoints" / str(step) / "meta")[0])
    with pytest.raises(CheckpointError, match="expected an intact checkpoint, found damaged ones only") as error:
        Checkpointer(saved).latest_intact()
    assert "delete the folder to start from the beginning" in assert_one_line(error)
    assert Checkpointer(saved / "elsewhere").latest_intact() is None


def test_a_checkpoint_of_an_older_version_is_trusted_with_a_warning(saved, capsys):
    (saved / "checkpoints" / "6" / "manifest.json").unlink()
    assert Checkpointer(saved).latest_intact() == 6
    assert "saved by an older version, trusted without checksums" in capsys.readouterr().err


def test_unfinished_checkpoints_of_an_interrupted_run_are_removed_and_nothing_else(saved, capsys):
    folder = saved / "checkpoints"
    ours = ["9.saving", "9.saving.orbax-checkpoint-tmp", "12.orbax-checkpoint-tmp-17", "1.deleting"]
    theirs = ["6.damaged", "copy of 6", "best"]
    for name in ours + theirs:
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")
    assert Checkpointer(saved, read_only=True).steps == [3, 6]
    assert len(list(folder.iterdir())) == 2 + len(ours + theirs)
    assert Checkpointer(saved).steps == [3, 6]
    assert {path.name for path in folder.iterdir()} == {"3", "6", *theirs}
    assert "removed unfinished checkpoints of an interrupted run" in capsys.readouterr().err


def test_every_nth_step_is_kept_permanently(tmp_path):
    checkpoints = Checkpointer(tmp_path, keep=1, keep_every=4)
    for step in range(2, 12, 2):
        checkpoints.save(step, state(step), state(step), DATA, META)
    checkpoints.close()
    assert Checkpointer(tmp_path, read_only=True).steps == [4, 8, 10]
    with pytest.raises(ValueError, match="keep_checkpoints"):
        Checkpointer(tmp_path, keep=0)


def test_a_disk_that_fills_up_costs_one_checkpoint_and_nothing_else(saved, monkeypatch):
    checkpoints = Checkpointer(saved)
    with monkeypatch.context() as patch:  # before
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
        with pytest.raises(
            CheckpointError, match=r"found 1 MiB too little; older checkpoints \[3, 6\] are intact"
        ) as error:
            checkpoints.save(9, state(9), state(9), DATA, META)
        assert_one_line(error)
    with monkeypatch.context() as patch:  # during
        patch.setattr(checkpoint, "write_manifest", full_disk)
        checkpoints.save(9, state(9), state(9), DATA, META)
        with pytest.raises(
            CheckpointError, match=r"9: could not be written: .*No space left.*\[3, 6\] are intact"
        ) as error:
            checkpoints.wait()
        assert_one_line(error)
    assert not checkpoints.failed and checkpoints.steps == [3, 6]
    assert {path.name for path in (saved / "checkpoints").iterdir()} == {"3", "6"}
    checkpoints.save(12, state(12), state(12), DATA, META)
    checkpoints.close()
    assert Checkpointer(saved, read_only=True).steps == [6, 12]


def full_disk(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_parameters_can_be_read_without_the_rest_of_the_state(saved):
    wanted = {"params": abstract(state()["params"])}
    params_only = Checkpointer(saved, read_only=True).arrays(6, partial=True, state=wanted)[STATE]
    assert jax.tree.structure(params_only) == jax.tree.structure(wanted)
    np.testing.assert_array_equal(params_only["params"]["kernel"], state(6)["params"]["kernel"])
    with pytest.raises(CheckpointError, match="missing more"):
        Checkpointer(saved, read_only=True).arrays(6, partial=True, state=wanted | {"more": abstract(jnp.ones(1))})


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="expected a run folder with checkpoints/, found none"):
        Checkpointer(tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()
