"""``python -m sam_kernels`` prints the doctor's report."""

from .doctor import main

if __name__ == "__main__":
    main()
