"""PPO inside the Push-T world model, rewarded by how close imagined tokens are to a demonstration's.

    python -m launch.train_rl --config=configs/pusht_rl.py --workdir=runs/pusht_rl --config.policy=runs/pusht_bc

| variant | for | environments | iterations |
|---|---|---|---|
| (none) | one GPU | 112 x 4 predictions | 300 |
| demo | two CPU cores, minutes (`bash launch/demo.sh`) | 32 x 4 | 40 |
"""

from ml_collections import ConfigDict

from configs import rl

VARIANTS = ("", "demo")


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of a variant; the launcher locks it against misspelt overrides."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/pusht_rl.py: expected a variant among {', '.join(VARIANTS[1:])}, found {variant!r}")
    config = rl.get_config()
    config.bank.datasets = ("pusht:demo",)
    config.data.val_episodes = 40
    # the release's 0.032 is for its backbone; this is a guess, and only the reported success depends on it
    config.env.success_threshold = 0.3
    config.env.update({"action_low": (0.0, 0.0), "action_high": (512.0, 512.0)})  # as rlawm_jax/sim/pusht.py clips
    if variant == "demo":
        config.residual.update({"hidden": (256, 128), "critic_hidden": (128, 64), "lora_rank": 4})
        # the critic cannot know which demonstration gives the score; four rollouts sharing start and noise can
        config.ppo.update({"num_envs": 32, "group_size": 4, "critic": False, "minibatch": 64, "epochs": 2})
        config.ppo.learning_rate = 1e-3
        config.sampler.steps = 10
        config.train.update({"iterations": 40, "iterations_per_call": 5, "checkpoint_every": 20})
    return config
