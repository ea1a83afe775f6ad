"""What the experiments train on: the digits of scikit-learn, and original data sets where a user has them.

digits, named -> split, files, pickles
shifted -> shifts, digits, named, files    samples that move step by step from a source to a target
"""

from .digits import digits
from .named import cifar, mnist
from .split import Split, flipped

__all__ = ["Split", "cifar", "digits", "flipped", "mnist"]
