"""What a training step needs of devices that need not be here: compiled ahead of time, counted, estimated."""
