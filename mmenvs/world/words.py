"""The closed vocabulary that questions and captions of every task share."""

from __future__ import annotations

from mmenvs.text import Vocabulary
from mmenvs.world.scene import COLOURS, SHAPES, SIZES, TEXTURES

PLURALS = ("circles", "squares", "triangles", "stars", "hearts", "crosses", "diamonds", "rings")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_FUNCTION = """
    yes no a an and or is are there the of than as same left right above below to in how many what which
    shape colour size texture object objects thing things more fewer number leftmost rightmost topmost
    bottommost largest smallest do you see any it has have does picture ? . ,
""".split()

VOCABULARY = Vocabulary((*SHAPES, *PLURALS, *COLOURS, *SIZES, *TEXTURES, *NUMBERS, *_FUNCTION))

# The word of value v of an attribute is FIRST_<attribute> + v.
FIRST_SHAPE = VOCABULARY.id(SHAPES[0])
FIRST_PLURAL = VOCABULARY.id(PLURALS[0])
FIRST_COLOUR = VOCABULARY.id(COLOURS[0])
FIRST_SIZE = VOCABULARY.id(SIZES[0])
FIRST_TEXTURE = VOCABULARY.id(TEXTURES[0])
