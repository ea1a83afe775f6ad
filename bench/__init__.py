"""Benchmarks: a parity gate first, then times. See bench/README.md."""
