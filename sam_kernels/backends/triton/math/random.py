"""Random numbers by counter: Philox4x32-10 (Salmon et al., SC 2011). A number is a function of seed, step,
tensor and element, so programs, blocks and devices cannot change it, and none has to be stored.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Words(NamedTuple):
    """What one call of philox makes: the words of four neighbours."""

    x0: tl.tensor
    x1: tl.tensor
    x2: tl.tensor
    x3: tl.tensor


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    # The words wrap on purpose; without sanitize_overflow=False a debug build stops at the first that does.
    for _ in tl.static_range(10):
        a_high, a_low = tl.umulhi(c0, 0xD2511F53), tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        b_high, b_low = tl.umulhi(c2, 0xCD9E8D57), tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)  # the golden ratio
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)  # sqrt(3) - 1
    return Words(x0=c0, x1=c1, x2=c2, x3=c3)


@triton.jit
def random_words(seed, step, tensor, element):
    # See note: [four neighbours] in csrc/math/random.h. An argument of 1 arrives as a constant, which has no
    # method `to`, hence cast().
    key = tl.cast(seed, tl.uint64)
    four = tl.cast(element, tl.uint64) >> 2
    return philox(
        four.to(tl.uint32),
        (four >> 32).to(tl.uint32),
        tl.cast(tensor, tl.uint32),
        tl.cast(step, tl.uint32),
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )


@triton.jit
def random_word(seed, step, tensor, element):
    words = random_words(seed, step, tensor, element)
    is_odd = (element & 1) != 0
    low, high = tl.where(is_odd, words.x1, words.x0), tl.where(is_odd, words.x3, words.x2)
    return tl.where((element & 2) != 0, high, low)


@triton.jit
def random_words_of_eight(seed, step, tensor, element):
    # See note: [eight neighbours] in csrc/math/random.h.
    return random_words(seed, step, tensor, element >> 3 << 2)


@triton.jit
def sixteen_of(words, element):
    # Those of element % 8 in the words of its eight: the low half of a word first.
    low = tl.where((element & 2) != 0, words.x1, words.x0)
    high = tl.where((element & 2) != 0, words.x3, words.x2)
    word = tl.where((element & 4) != 0, high, low)
    return tl.where((element & 1) != 0, word >> 16, word & 0xFFFF)


@triton.jit
def uniform(word):
    # In [0, 1). 24 bits are what a float holds, so nothing is rounded, 1 is never reached, and every engine
    # gets the same bits.
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
