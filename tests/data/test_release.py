"""The release's names: a folder of the release means one dataset, however it is named."""

import pytest

from data.names import word
from data.release import IWS_TASKS, OUTCOMES, PLAY_TASK, ROBOTS, dataset_and_split, dataset_references, iws, play, ppo

FOLDERS = [
    *(f"ppo/{name}/{task}/{group}" for name, robot in ROBOTS.items() for task in robot.tasks for group in OUTCOMES),
    *(f"play/{name}/{PLAY_TASK}/{group}" for name, robot in ROBOTS.items() for group in robot.play),
    *(f"iws_converted/{task}" for task in IWS_TASKS),
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_recipes_and_evaluation_handles_mean_the_same_dataset_by_a_folder(folder):
    name, split = dataset_and_split(["home", "someone", *folder.split("/")])
    assert dataset_references(f"/home/someone/{folder}") == (f"{name}_512px:{split}",)


def test_every_folder_of_the_tree_is_in_one_list_of_datasets():
    listed = [reference for robot in ROBOTS for reference in ppo(robot) + play(robot)]
    listed += [reference for task in IWS_TASKS for reference in iws(task)]
    assert sorted(listed) == sorted(ref for folder in FOLDERS for ref in dataset_references(folder))
    assert len(set(listed)) == len(listed)


def test_a_word_is_ascii_letters_digits_and_underscores():
    assert word("-Push T, v2/é.") == "Push_T_v2"
