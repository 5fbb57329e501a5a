"""Every field of a reinforcement learning recipe at the official values (METHOD.md section 9).

Recipes start from `get_config()` here and change what they need; nothing reads a field that is not set here.
"""

from ml_collections import ConfigDict

from configs import policy


def get_config() -> ConfigDict:
    """The official recipe without its data."""
    return ConfigDict(
        {
            "seed": 0,  # for starts, actions, noise and minibatches
            "policy": "",  # run folder of the cloned policy to improve (launch.train_policy)
            "world_model": "",  # run folder of the world model; empty: the one that the policy was trained with
            "learner": "ppo",  # ppo | pathwise (ours); its settings are the section of that name
            "residual": policy.residual(),
            "env": {
                "max_chunks": 6,  # predictions until truncation
                "initial_prob": 0.5,  # of starting at a demonstration's first frame
                "metric": "l1",  # of the reward: l1 | l2 | cosine
                "target": "corresponding",  # corresponding | goal
                "reward_scale": 5.0,
                "success_threshold": 0.032,  # distance to the goal, in units of `metric`
                "terminal_bonus": 0.0,
                # bounds of raw rows, one per dimension, to which the simulator clips; (): imagined rows are not clipped
                "action_low": (),
                "action_high": (),
                "reward_draws": 1,  # ours: predictions, each with its own noise, that a reward is the mean of
            },
            # temperature: of the noise the flow starts from; euler, 1 step and 0 predict the mean
            "sampler": {"solver": "euler", "steps": 30, "temperature": 1.0},
            "bank": {
                "datasets": (),  # "name:split" of the demonstrations
                "episodes": 0,  # of the training split; 0: all
                "store": "bfloat16",  # bfloat16 | int8 | frames (uint8, encoded in the loop)
                "limit_gib": 8.0,  # per device; a larger bank is refused
            },
            "ppo": {
                "num_envs": 112,
                "num_steps": 4,  # predictions per environment and iteration
                # ours: environments that share start and noise; the others' mean is a baseline that needs no critic
                "group_size": 1,
                "minibatch": 224,
                "epochs": 4,
                "clip": 0.2,
                "target_kl": 0.1,
                "gamma": 0.9,
                "gae_lambda": 0.95,
                "value_coef": 0.5,
                "entropy_coef": 0.0,
                # ours: of the exploration noise of neighbouring action rows, in [0, 1); 0: white, as released
                "exploration_correlation": 0.0,
                "critic": True,  # False: REINFORCE with the clipped ratio
                "normalise_rewards": False,
                "learning_rate": 1e-4,
                "critic_learning_rate": 1e-4,
                "weight_decay": 0.0,
                "max_grad_norm": 0.5,
            },
            # ours: ascends the derivative of the imagined return, as in SHAC and PWM
            "pathwise": {
                "num_envs": 64,
                "num_steps": 2,  # predictions that are differentiated together
                "group_size": 1,
                "gamma": 0.99,
                "gae_lambda": 0.95,
                "critic": True,  # False: what follows the differentiated predictions does not count
                "critic_updates": 16,  # per iteration
                "target_decay": 0.8,
                "remat": True,  # recompute every prediction for the gradient: less memory, more time
                "exploration_correlation": 0.0,
                "learning_rate": 5e-4,
                "critic_learning_rate": 1e-3,
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,
            },
            "data": {
                "root": "datasets",
                "token_root": "datasets/tokens",
                "val_episodes": 10,  # ids below this are held out, in every dataset
            },
            "train": {
                "iterations": 300,
                "iterations_per_call": 5,  # without host synchronisation
                "checkpoint_every": 50,
                "keep_checkpoints": 2,  # the newest ones; two, so that a damaged one costs an interval and not the run
                "keep_every": 0,  # also keep every n-th iteration's checkpoint for good; 0: none
                "on_nonfinite": "stop",  # stop (after saving the last good state) | skip (such calls change nothing)
            },
            "eval": {"episodes": 64, "seed": 2026},  # imagined returns before and after, on seen and held-out starts
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "logging": {"tensorboard": True, "wandb": False, "wandb_project": "rlawm"},
        }
    )
