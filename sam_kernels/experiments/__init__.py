"""The experiments of the documents behind this package: ``python -m sam_kernels experiments list``.

    command -> registry, runner, documents           the program
    runner -> store, progress                        trials, one line of JSON each
    groups -> training, self_training, convergence   one file or folder for each group of experiments
    training -> models, data                         and choices: what was set without the test set
    groups -> verdicts, summaries, tables, pictures  from rows to findings

All of them speak in the words of `experiment`: trials, rows, findings, claims.
"""
