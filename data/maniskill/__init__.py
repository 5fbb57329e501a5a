"""The authors' ManiSkill data (PPO rollouts and play) as a dataset."""
