"""What only a GPU can give, by `make gpu-check`: proof that the CUDA kernels are right, and figures."""
