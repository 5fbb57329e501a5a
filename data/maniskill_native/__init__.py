"""ManiSkill's native trajectory files with observations as a dataset."""
