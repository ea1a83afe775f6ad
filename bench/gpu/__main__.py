"""python -m bench.gpu is bench.gpu.check."""

from .check import main

if __name__ == "__main__":
    raise SystemExit(main())
