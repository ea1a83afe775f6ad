"""One file for each group of experiments; each has an `EXPERIMENT`."""
