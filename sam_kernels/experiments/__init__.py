"""The experiments of the documents behind this package: ``python -m sam_kernels experiments list``.

command -> registry, runner, documents      the program
groups -> experiment, training, models, data, tables, pictures   one file for each group of experiments
runner -> store, progress                   trials, one line of JSON each
"""
