"""The metrics file after interruptions: no duplicate or truncated lines, and valid JSON only."""

import json

import pytest

from configs import base
from rlawm_jax.run_folder.logging import METRICS_FILE, MetricLogger


@pytest.fixture
def config():
    config = base.get_config()
    config.logging.tensorboard = False
    return config


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]


def test_a_resumed_run_leaves_no_duplicate_or_truncated_line(tmp_path, config):
    logger = MetricLogger(tmp_path, config, resumed_from=0)
    for step in range(1, 6):
        logger.write(step, {"loss": float(step)})
    # killed here: the file is complete without close, and has a truncated line of step 6
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "lo')
    logger = MetricLogger(tmp_path, config, resumed_from=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    for step in range(4, 7):
        logger.write(step, {"loss": float(step)})
    logger.close()
    assert lines(tmp_path) == [{"step": step, "loss": float(step)} for step in range(1, 7)]


def test_a_run_from_the_start_drops_the_lines_of_an_earlier_one_without_a_checkpoint(tmp_path, config):
    MetricLogger(tmp_path, config, resumed_from=0).write(1, {"loss": 1.0})
    MetricLogger(tmp_path, config, resumed_from=0).write(1, {"loss": 2.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_nonfinite_numbers_become_null(tmp_path, config):
    MetricLogger(tmp_path, config, resumed_from=0).write(1, {"a": float("nan"), "b": float("inf"), "c": 0.5})
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 0.5}]


def test_tensorboard_is_written_if_the_config_asks_for_it(tmp_path, config):
    config.logging.tensorboard = True
    logger = MetricLogger(tmp_path, config, resumed_from=0)
    logger.write(1, {"loss": 1.0})
    logger.close()
    assert [path.stat().st_size > 0 for path in (tmp_path / "tensorboard").iterdir()] == [True]
