"""Several processes are one run: same batches, same losses, one checkpoint, whatever their number."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from data.pipeline import WindowLoader
from launch import cli
from rlawm_jax import hosts
from rlawm_jax.evaluation import motion
from rlawm_jax.evaluation.open_loop import OpenLoop, evaluate
from rlawm_jax.sharding import batch_share
from rlawm_jax.training.loop import train
from rlawm_jax.training.restore import load_world_model
from rlawm_jax.training.setup import prepare
from tests.tiny_run import read_metrics, tiny_config
from tests.tools.multi_process import RECIPE, ROWS, all_well, launch_together, look_together, train_together


def layout(tensor: int, *processes: int) -> types.SimpleNamespace:
    """What `batch_share` reads of a mesh whose devices, in order, belong to these processes."""
    devices = np.array([types.SimpleNamespace(process_index=p) for p in processes]).reshape(-1, 1, tensor)
    return types.SimpleNamespace(devices=devices, shape={"tensor": tensor})


@pytest.mark.parametrize(
    ("mesh", "shares"),
    [
        (layout(1, 0, 0, 1, 1), [(0, 2), (1, 2)]),
        (layout(2, 0, 0, 1, 1), [(0, 2), (1, 2)]),
        (layout(4, 0, 0, 1, 1), [(0, 1), (0, 1)]),  # one row over both: both feed all of it
        (layout(2, 0, 1, 2, 3), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (layout(1, 0, 1, 1, 0), [(0, 2), (1, 2)]),  # a ring over hosts
        (layout(1, 1, 1, 0, 0), [(1, 2), (0, 2)]),
    ],
)
def test_processes_feed_the_rows_their_devices_hold(mesh, shares):
    assert [batch_share(mesh, process) for process in range(len(shares))] == shares


@pytest.mark.parametrize("mesh", [layout(1, 0, 0, 0, 1), layout(2, 0, 0, 0, 1, 1, 1)])
def test_rows_that_lie_unevenly_on_processes_are_refused(mesh):
    with pytest.raises(ValueError, match=r"config\.mesh: expected processes that hold the same number of batch parts"):
        batch_share(mesh, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a:1", 2, None), r"--coordinator, --num_processes, --process_id: expected all three or none"),
        (("a:1", 2, 2), r"--process_id: expected 0 to 1 .*found 2"),
    ],
)
def test_an_incomplete_address_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hosts.join(*arguments)


def test_a_single_process_does_the_work_directly():
    done = []
    hosts.on_first_process(lambda: done.append(1))
    assert done == [1] and not hosts.joined()
    assert hosts.exchange({"a": 1}) == [{"a": 1}]


@pytest.mark.parametrize(
    ("processes", "devices", "tensor", "late", "shares"),
    [
        (2, 2, 1, 0, [[0, 2], [1, 2]]),
        (4, 1, 2, 0, [[0, 2], [0, 2], [1, 2], [1, 2]]),
        pytest.param(2, 1, 1, 35, [[0, 2], [1, 2]], marks=pytest.mark.slow),  # gloo alone waits for 30 s
    ],
)
def test_processes_see_one_batch_and_one_set_of_parameters(processes, devices, tensor, late, shares):
    results = look_together(processes, devices, tensor, late)
    assert [one["share"] for one in results] == shares
    for process, one in enumerate(results):
        assert one["processes"] == processes
        assert one["sum"] == one["alone"]  # integers
        assert one["whole"]
        assert one["piece"] == ROWS * ROWS // (processes * devices)
        assert one["worked"] == (2 if process == 0 else 0)
        assert one["waited"] > 0.5
        assert one["exchanged"] == [[f"process {i}"] * i for i in range(processes)]


@pytest.fixture(scope="module")
def alone(tiny_root, tmp_path_factory):
    """Metrics of the run in this one process."""
    workdir = tmp_path_factory.mktemp("alone")
    train(prepare(tiny_config(tiny_root, **RECIPE | {"train.steps": 4}), workdir), workdir)
    return read_metrics(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "mesh"), [(2, 2, {"fsdp": 2}), (4, 1, {"fsdp": 2, "tensor": 2})])
def test_processes_train_save_resume_and_evaluate_as_one_does(alone, tiny_root, tmp_path, processes, devices, mesh):
    recipe = RECIPE | {f"mesh.{axis}": size for axis, size in mesh.items()}
    for steps in (2, 4):  # the second run resumes from the first's checkpoint
        outcomes = train_together(processes, devices, tiny_root, tmp_path, recipe | {"train.steps": steps})
        all_well(outcomes)
    assert any("resuming from step 2" in text for _, text in outcomes)
    ours = read_metrics(tmp_path)
    assert [line["step"] for line in ours] == [1, 2, 3, 4]
    for line, one in zip(ours, alone, strict=True):
        assert line.keys() == one.keys()
        for name, value in one.items():
            # float32 sums in another order, which Muon's orthogonalisation of small gradients magnifies
            np.testing.assert_allclose(line[name], value, rtol=1e-3, atol=1e-6, err_msg=name)
    # they evaluate as one does
    all_well(launch_together(processes, 1, "launch.evaluate", f"--workdir={tmp_path}"))
    together = json.loads((tmp_path / "metrics.json").read_text())
    model, config, info = load_world_model(tmp_path, with_backbone=True)
    loader = WindowLoader(config.data, fingerprint=info["fingerprint"], with_frames=True)
    loop = OpenLoop(model, config, loader, images=False)
    one = json.loads(json.dumps(dataclasses.replace(evaluate(loop), motion=motion.measure(loop)).to_json()))
    assert jax.tree.structure(together) == jax.tree.structure(one)
    for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(one), strict=True):
        assert ours == (pytest.approx(theirs, rel=1e-5) if isinstance(theirs, float) else theirs)
    # and one process resumes where several stopped
    config = tiny_config(tiny_root, **RECIPE | {"train.steps": 5})
    train(prepare(config, tmp_path), tmp_path)
    assert read_metrics(tmp_path)[-1]["step"] == 5


@pytest.mark.slow
def test_processes_say_of_held_out_windows_what_one_does(tiny_root, tmp_path):
    recipe = RECIPE | {"train.steps": 2, "train.validate_every": 2}
    alone, together = tmp_path / "alone", tmp_path / "together"
    train(prepare(tiny_config(tiny_root, **recipe), alone), alone)
    all_well(train_together(2, 1, tiny_root, together, recipe | {"mesh.fsdp": 2}))
    one, ours = ([line for line in read_metrics(folder) if "val/own_over_copy" in line] for folder in (alone, together))
    assert [line["step"] for line in ours] == [2]
    for name, value in one[0].items():
        np.testing.assert_allclose(ours[0][name], value, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_mistake_ends_every_process_with_one_line(tiny_root, tmp_path):
    outcomes = train_together(2, 1, tiny_root, tmp_path, RECIPE | {"data.batch_size": 3})
    for status, text in outcomes:
        assert status == 1
        assert text.count("error: config.data.batch_size: expected a multiple of data x fsdp = 2") == 1
        assert "Traceback" not in text


def test_a_run_folder_in_an_object_store_is_refused():
    assert cli.run_folder("runs/x").name == "x"
    with pytest.raises(ValueError, match=r"--workdir: expected a folder of a file system .* found gs://bucket/run;"):
        cli.run_folder("gs://bucket/run")
