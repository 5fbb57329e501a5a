"""LeRobot datasets, v3.0 and v2.1, as datasets of the episode contract."""
