"""The reinforcement learning recipe over the tiny dataset and a tiny cloned policy."""

from configs import rl


def make(tiny_root, cloned, **overrides):
    """The official recipe made tiny; overrides by name, "ppo__num_envs"."""
    config = rl.get_config()
    config.policy = str(cloned)
    config.residual.update({"hidden": (8,), "critic_hidden": (8,), "lora_rank": 2})
    config.env.update({"max_chunks": 2, "success_threshold": 0.5})
    config.sampler.steps = 2
    config.bank.datasets = ("pusht:demo",)
    config.ppo.update({"num_envs": 4, "num_steps": 2, "minibatch": 4, "epochs": 2, "learning_rate": 1e-2})
    config.pathwise.update({"num_envs": 4, "learning_rate": 1e-2})
    config.data.update({"root": str(tiny_root), "token_root": str(tiny_root / "tokens"), "val_episodes": 2})
    config.train.update({"iterations": 4, "iterations_per_call": 2, "checkpoint_every": 2})
    config.logging.tensorboard = False
    config.lock()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config
