"""One kernel per pass, as csrc/ops/cuda has them."""
