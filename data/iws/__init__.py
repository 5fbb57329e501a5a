"""The release's interactive-world-simulator data as a dataset."""
