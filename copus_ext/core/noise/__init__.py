"""The gradient noise scale: two unbiased numbers a step, smoothed, with an honest interval."""
