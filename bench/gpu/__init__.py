"""What only a GPU can give, by `make gpu-check`: proof that our kernels on it are right, and figures."""
