"""What a training step needs on any devices: compiled ahead of time, counted and estimated."""
