"""Places what is imported after it elsewhere in memory and in the interpreter's cache of class attributes.

CPython finds most attributes of a class in a cache of 4,096 places. Which place, the address of the attribute's name
and the number of its class say, and classes are numbered in the order in which somebody asks them for something first.
Two that a request needs and that share a place throw each other out, at up to thousands of instructions each time. So
a small change to a program moves its count by several thousand, up or down, although nothing was added: what a change
costs on average shows only over many numberings. (The environment's length alone moves addresses, but no numbers:
counts over it agree with each other, and not with the next program.)
"""

from __future__ import annotations

import os

# A prime, so that layouts do not differ by the sizes of things.
STEP = 37


def numbered_class() -> type:
    """A class that has a number, because it was asked for something."""
    made = type("Padding", (), {})
    getattr(made(), "anything", None)
    return made


PADDING = [numbered_class() for _ in range(STEP * int(os.environ.get("LAYOUT", "0")))]
