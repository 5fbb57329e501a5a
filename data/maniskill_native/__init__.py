"""ManiSkill's own trajectory files with observations as a dataset."""
