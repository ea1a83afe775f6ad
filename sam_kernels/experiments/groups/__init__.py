"""One file or folder for each group of experiments; each has an `EXPERIMENT`."""
