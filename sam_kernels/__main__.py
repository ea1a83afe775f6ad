"""``python -m sam_kernels`` prints the doctor's report, ``... experiments`` runs experiments."""

import sys

from .doctor import report


def main(arguments: list[str]) -> int:
    """Run what the first word says; the exit code."""
    if arguments[:1] == ["experiments"]:
        from .experiments.command import main as experiments

        return experiments(arguments[1:])
    if arguments:
        print(
            f"python -m sam_kernels: {arguments[0]!r} is not known; expected nothing, for the doctor's "
            "report, or experiments",
            file=sys.stderr,
        )
        return 2
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
