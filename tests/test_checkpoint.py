"""Checkpoints: what goes in comes out bit for bit, and what does not fit is refused in one line."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import pusht
from rlawm_jax.checkpoint import FROZEN, STATE, Checkpointer, CheckpointError, config_from_meta

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
    found = checkpoints.arrays(6, **{STATE: abstract(state()), FROZEN: abstract({"scale": jnp.ones(2)})})
    for left, right in zip(jax.tree.leaves(found[STATE]), jax.tree.leaves(state(6)), strict=True):
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


@pytest.mark.parametrize("item", ["state", "data", "meta"])
def test_a_truncated_file_is_refused_with_the_way_on(saved, item):
    for path in files_of(saved / "checkpoints" / "6" / item):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoints = Checkpointer(saved, read_only=True)
    read = {"state": lambda: checkpoints.arrays(6, state=abstract(state()))}
    with pytest.raises(CheckpointError, match=rf"checkpoint {saved}/checkpoints/6: expected readable") as error:
        read.get(item, lambda: getattr(checkpoints, item)(6))()
    assert "delete that folder to go on from an older checkpoint ([3, 6])" in assert_one_line(error)


def test_truncated_arrays_alone_are_refused_too(saved):
    largest = files_of(saved / "checkpoints" / "6" / "state")[0]
    largest.write_bytes(largest.read_bytes()[:10])
    with pytest.raises(CheckpointError) as error:
        Checkpointer(saved, read_only=True).arrays(6, state=abstract(state()))
    assert_one_line(error)
    older = Checkpointer(saved, read_only=True).arrays(3, state=abstract(state()))
    assert older[STATE]["step"] == 3


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="expected a run folder with checkpoints/, found none"):
        Checkpointer(tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()


def test_the_config_comes_back_equal_and_locked():
    config = pusht.get_config("debug")
    found = config_from_meta({"config": config.to_json_best_effort()})
    assert found.to_json_best_effort() == config.to_json_best_effort()
    assert found.train.steps == config.train.steps
    with pytest.raises(AttributeError, match="steps"):
        found.train.stesp = 3
