# SPDX-License-Identifier: Apache-2.0
"""How captions become prompts: what tiny-sd was trained on, and what its benchmark asks for."""

import re

STYLES = ("google emoji", "twitter emoji", "3d emoji", "pixel tile", "clip art")

# Plurals and mass nouns that read wrongly behind "a"; a trailing s is handled by rule.
_NO_ARTICLE = frozenset(
    """
    people children men women hair bread rice cheese water money music fire ice snow rain
    fog grass wood gold silver milk salt butter food fruit furniture clothing sand dna
    """.split()  # noqa: SIM905  a list of quoted words reads worse
)


def with_article(noun: str) -> str:
    """``noun`` behind "a" or "an"; plurals, mass nouns and what has an article stay bare."""
    words = noun.split()
    last = words[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if plural or last in _NO_ARTICLE or words[0] in {"a", "an", "the", "my", "one"}:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption_prompt(caption: str, style: str) -> str:
    """``("red apple", "3d emoji")`` -> ``"a 3d emoji of a red apple"``.

    Lower-cases, drops punctuation and words of digits only; an empty caption gives the style alone.
    """
    words = re.sub(r"[^\w\s'-]|_", " ", caption.lower()).split()
    noun = " ".join(w for w in words if not w.isdigit())
    return f"a {style} of {with_article(noun)}" if noun else f"a {style}"


# The templates of Textual Inversion (Gal et al. 2022), as diffusers' training script has them.
OBJECT_TEMPLATES = tuple(
    """a photo of a {}
a rendering of a {}
a cropped photo of the {}
the photo of a {}
a photo of a clean {}
a photo of a dirty {}
a dark photo of the {}
a photo of my {}
a photo of the cool {}
a close-up photo of a {}
a bright photo of the {}
a cropped photo of a {}
a photo of the {}
a good photo of the {}
a photo of one {}
a close-up photo of the {}
a rendition of the {}
a photo of the clean {}
a rendition of a {}
a photo of a nice {}
a good photo of a {}
a photo of the nice {}
a photo of the small {}
a photo of the weird {}
a photo of the large {}
a photo of a cool {}
a photo of a small {}""".splitlines()
)
STYLE_TEMPLATES = tuple(
    """a painting in the style of {}
a rendering in the style of {}
a cropped painting in the style of {}
the painting in the style of {}
a clean painting in the style of {}
a dirty painting in the style of {}
a dark painting in the style of {}
a picture in the style of {}
a cool painting in the style of {}
a close-up painting in the style of {}
a bright painting in the style of {}
a cropped painting in the style of {}
a good painting in the style of {}
a close-up painting in the style of {}
a rendition in the style of {}
a nice painting in the style of {}
a small painting in the style of {}
a weird painting in the style of {}
a large painting in the style of {}""".splitlines()
)
