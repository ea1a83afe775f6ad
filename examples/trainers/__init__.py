"""One small program for each trainer; seconds on a CPU, nothing is downloaded."""
