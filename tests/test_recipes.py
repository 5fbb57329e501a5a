"""The release's recipes, field by field, against the tables of its configs (METHOD.md 13.8)."""

import pytest

from configs import iws, maniskill
from data import release
from data.maniskill.builder import split_name

# all world models: what the release's configs have in common
WORLD_MODEL = {
    "backbone.name": "dinov3_vitl16",
    "backbone.image_size": 512,
    "rla.num_tokens": 32,
    "rla.token_dim": 64,
    "rla.width": 1024,
    "rla.depth": 12,
    "rla.heads": 16,
    "rla.mlp_ratio": 4.0,
    "rla.input_mode": "sub",
    "rla.decoder_output": "absolute",
    "denoiser.width": 1024,
    "denoiser.heads": 16,
    "denoiser.mlp_ratio": 4.0,
    "denoiser.token_embedding": False,
    "denoiser.action_in_flow": False,
    "denoiser.time_schedule": "logit_normal",
    "latent_scale.value": 10.0,
    "latent_scale.running": False,
    "data.min_horizon": 2,
    "data.max_horizon": 15,
    "data.stride": 1,
    "data.min_num_frames": 5,
    "data.val_episodes": 10,
    "data.mask_top": 0.0,
    "data.action_statistics": "none",
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-4,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup_steps": 0,
    "optimizer.decay": "constant",
    "optimizer.clip": 0.0,
    "objectives.denoiser.enabled": True,
    "objectives.denoiser.l1": 1.0,
    "objectives.denoiser.mse": 1.0,
    "objectives.denoiser.lr_scale": 1.0,
    "objectives.denoiser.repeats": 1,
    "objectives.rla.enabled": False,
    "objectives.image_decoder.enabled": False,
    "sampler.solver": "euler",
    "sampler.steps": 30,
    "train.accumulate": 1,
    "train.log_every": 50,
    "train.checkpoint_every": 2500,
}
MANISKILL = {
    "denoiser.cond_depth": 8,
    "denoiser.flow_depth": 8,
    "data.batch_size": 64,
    "data.horizon_sampling": "beta",
    "data.last_action": False,
    "data.interaction.prob": 0.9,
    "data.interaction.distance": 0.25,
    "data.interaction.movement": 0.002,
    "data.interaction.buffer": 3,
    "eval.horizons": (5, 15, 30),
    "train.init_from": "runs/maniskill/rla_32x64",
}
IWS = {
    "denoiser.cond_depth": 12,
    "denoiser.flow_depth": 12,
    "data.horizon_sampling": "uniform",
    "data.last_action": True,
    "data.interaction.prob": 0.0,
    "eval.horizons": (60,),
}
RLA = {
    "objectives.rla.enabled": True,
    "objectives.rla.l1": 1.0,
    "objectives.rla.mse": 1.0,
    "objectives.rla.lr_scale": 1.0,
    "objectives.denoiser.enabled": False,
    "rla.num_tokens": 32,
    "rla.token_dim": 64,
    "rla.variational": False,
    "data.min_horizon": 2,
    "data.max_horizon": 100,
    "data.horizon_sampling": "uniform",
    "data.interaction.prob": 0.9,
    "data.batch_size": 128,
    "data.val_episodes": 10,
    "data.last_action": False,
    "data.mask_top": 0.0,
    "train.accumulate": 1,
    "train.init_from": "",
}
IWS_RLA = {"data.max_horizon": 200, "data.interaction.prob": 0.0}
IMAGE_DECODER = {
    "objectives.image_decoder.enabled": True,
    "objectives.rla.enabled": False,
    "objectives.denoiser.enabled": False,
    "objectives.image_decoder.l1": 1.0,
    "objectives.image_decoder.ssim": 0.2,
    "objectives.image_decoder.lpips": 0.2,
    "objectives.image_decoder.max_images": 32,
    "image_decoder.width": 1024,
    "data.batch_size": 32,
    "data.mask_top": 0.0,
    "train.steps": 60_000,
    "train.checkpoint_every": 5_000,
}
TABLE = {
    (maniskill, "panda"): WORLD_MODEL | MANISKILL | {"denoiser.action_dims": {"0": 9}},
    (maniskill, "xarm"): WORLD_MODEL | MANISKILL | {"denoiser.action_dims": {"1": 12}},
    (maniskill, "ur10e"): WORLD_MODEL | MANISKILL | {"denoiser.action_dims": {"2": 6}},
    (maniskill, "rla_32x64"): RLA,
    (maniskill, "rla_8x8"): RLA | {"rla.num_tokens": 8, "rla.token_dim": 8, "train.accumulate": 2},
    (maniskill, "rla_32x64_play"): RLA | {"data.horizon_sampling": "beta", "data.val_episodes": 0},
    (maniskill, "image_decoder"): IMAGE_DECODER,
    (iws, "box"): WORLD_MODEL
    | IWS
    | {"denoiser.action_dims": {"0": 14}, "data.batch_size": 48, "train.init_from": "runs/iws/rla_32x64"},
    (iws, "rope"): WORLD_MODEL
    | IWS
    | {"denoiser.action_dims": {"0": 8}, "data.batch_size": 48, "train.init_from": "runs/iws/rla_32x64"},
    (iws, "pusht"): WORLD_MODEL
    | IWS
    | {"denoiser.action_dims": {"0": 4}, "data.batch_size": 64, "train.init_from": "runs/iws/rla_32x64_pusht_only"},
    (iws, "rla_32x64"): RLA | IWS_RLA | {"data.mask_top": 0.25},
    (iws, "rla_32x64_pusht_only"): RLA | IWS_RLA | {"data.batch_size": 126, "train.accumulate": 3},
    (iws, "image_decoder"): IMAGE_DECODER,
}
# group -> (datasets, weight, min_start_frame)
PLAY = {
    "panda": ("pick_and_place", "tool_push", "push_only"),
    "xarm6_robotiq": ("pick_and_place", "tool_push", "push_only"),
    "ur10e": ("push_only",),
}
TASKS = {
    "panda": ("PullCube_v2", "PullCubeTool_v1"),
    "xarm6_robotiq": ("PegInsertionSide_v1", "PokeCube_v2"),
    "ur10e": ("PushT_v2", "RollBall_v1"),
}


def ppo(robot: str) -> tuple[str, ...]:
    return tuple(f"maniskill/{robot}_512px:{task}_{group}" for task in TASKS[robot] for group in ("success", "fail"))


def play(robot: str) -> tuple[str, ...]:
    return tuple(f"maniskill/{robot}_512px:TableOnly_v2_{kind}" for kind in PLAY[robot])


def groups(config) -> set[tuple[tuple[str, ...], float, int]]:
    return {(group.datasets, group.weight, group.min_start_frame) for group in config.data.groups.values()}


def field(config, name: str):
    for piece in name.split("."):
        config = config[piece]
    return config.to_dict() if hasattr(config, "to_dict") else config


def test_every_variant_has_its_line_in_the_table():
    assert set(TABLE) == {(module, variant) for module in (maniskill, iws) for variant in module.VARIANTS}


@pytest.mark.parametrize(("module", "variant"), TABLE, ids=[f"{m.__name__[8:]}-{v}" for m, v in TABLE])
def test_a_recipe_equals_the_release_field_by_field(module, variant):
    config = module.get_config(variant)
    assert {name: field(config, name) for name in TABLE[module, variant]} == TABLE[module, variant]


@pytest.mark.parametrize(("variant", "robot"), zip(release.ROBOTS, TASKS, strict=True))
def test_a_world_model_of_maniskill_draws_its_robots_tasks_and_lists_play_with_no_weight(variant, robot):
    assert groups(maniskill.get_config(variant)) == {(ppo(robot), 1.0, 0), (play(robot), 0.0, 25)}


@pytest.mark.parametrize("variant", ["rla_32x64", "rla_8x8", "image_decoder"])
def test_the_rla_draws_every_robots_tasks_and_play_at_half_the_weight(variant):
    expected = {(ppo(robot), 1.0, 0) for robot in TASKS} | {(play(robot), 0.5, 25) for robot in TASKS}
    assert groups(maniskill.get_config(variant)) == expected


def test_the_play_only_rla_draws_play_only():
    assert groups(maniskill.get_config("rla_32x64_play")) == {(play(robot), 1.0, 25) for robot in TASKS}


def test_iws_recipes_draw_their_tasks_with_equal_weight():
    tasks = ("bimanual_box", "bimanual_rope", "bimanual_sweep", "pusht", "single_chain_in_box", "single_grasp")
    every = [((f"iws/{task}_512px:episodes",), 1.0, 0) for task in tasks]
    assert groups(iws.get_config("rla_32x64")) == groups(iws.get_config("image_decoder")) == set(every)
    for variant, task in (("box", 0), ("rope", 1), ("pusht", 3), ("rla_32x64_pusht_only", 3)):
        assert groups(iws.get_config(variant)) == {every[task]}


def test_datasets_robots_and_widths_are_those_the_builders_make(tmp_path):
    for name, robot in release.ROBOTS.items():
        built = release.robot_of(name)
        assert (robot.name, robot.robot_id, robot.joints) == (built.name, built.robot_id, built.joints)
        for task in robot.tasks:
            splits = [split_name(tmp_path / task / group) for group in ("success", "fail")]
            assert [f"maniskill/{built.name}_512px:{split}" for split in splits] == [
                reference for reference in release.ppo(name) if splits[0][:-8] in reference
            ]
    built = {robot.name: (robot.robot_id, robot.joints) for robot in release.ROBOTS.values()}
    assert built == {"panda": (0, 9), "xarm6_robotiq": (1, 12), "ur10e": (2, 6)}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("ppo/panda/PullCube-v2/*", ppo("panda")[:2]),
        ("/home/someone/data/maniskill/ppo/xarm6_robotiq/PokeCube-v2/fail", ppo("xarm6_robotiq")[3:]),
        ("ppo/ur10e/*/success", ppo("ur10e")[::2]),
        ("play/panda/TableOnly-v2/*", play("panda")),
        ("data/iws_converted/pusht/", ("iws/pusht_512px:episodes",)),
        ("bimanual_box", ("iws/bimanual_box_512px:episodes",)),
        ("novel_maniskill/ppo/panda/PushT-v2/*", ()),
        ("somewhere/else", ()),
    ],
)
def test_directories_of_the_release_are_found_under_our_names(path, expected):
    assert release.dataset_references(path) == expected


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"configs/iws\.py: expected a variant among pusht, box, rope, .* found 'cube'"
    ):
        iws.get_config("cube")
