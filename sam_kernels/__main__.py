"""``python -m sam_kernels`` prints the doctor's report, ``... experiments`` runs experiments."""

import sys

from .doctor import report

USAGE = """\
usage: python -m sam_kernels [experiments ...]

  python -m sam_kernels                       the doctor's report: what is installed, and which backend runs
  python -m sam_kernels experiments           list the experiments and what has been run
  python -m sam_kernels experiments NAME      run one and report
  python -m sam_kernels experiments --help    all that can be asked of them
"""


def main(arguments: list[str]) -> int:
    """Run what the first word says; the exit code."""
    if arguments[:1] == ["experiments"]:
        from .experiments.command import main as experiments

        return experiments(arguments[1:])
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if arguments:
        print(
            f"python -m sam_kernels: {arguments[0]!r} is not known; expected nothing, for the doctor's "
            "report, experiments, or --help",
            file=sys.stderr,
        )
        return 2
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
