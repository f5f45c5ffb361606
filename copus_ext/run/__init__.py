"""The driver: a training run as a sequence of segments, one plan each."""
