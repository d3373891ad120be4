# SPDX-License-Identifier: Apache-2.0
"""Subjects whose pictures are of one colour each."""

from PIL import Image

STYLES = ("google emoji", "twitter emoji", "3d emoji")
COLORS = {"rose": (250, 0, 0), "sea": (0, 0, 250), "leaf": (0, 250, 0)}


def picture(color):
    return Image.new("RGB", (64, 64), color)
