"""Captions of the web, cleaned: each rule is a function of one caption, and counts the captions it changes.

The rules run in order, again and again until none changes anything, so the result is a fixed point: cleaning it again does nothing. They come
to an end: `normalise_unicode` does nothing twice in a row, and any other rule that changes a caption takes away characters other than the space,
or, where it takes none, spaces (in the canonical decomposition, which `normalise_unicode` leaves alone; every entity is longer than what it
stands for). Both numbers are finite, and no rule raises the first.

A rule's trigger is a pattern that holds wherever the rule has something to do. It is looked for in all captions at once (RE2 within pyarrow), so
that Python sees only the few captions that a rule may change, and a caption that many rows share is cleaned once.
"""

import html
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.data import CaptionConfig, CaptionRules
from stages.select.patterns import (
    BOILERPLATE,
    CAMERA,
    CONTROL,
    DATE,
    EMPTY_BRACKETS,
    FILE_NAME,
    INVISIBLE_RE2,
    LEADING,
    REPEATED,
    SIZE,
    SPACES,
    STRAY_SPACE,
    TAG,
    TRAILING,
    URL,
    WIDE_RE2,
)


def unescape_html(caption: str) -> str:
    """`&amp;quot;` to a quotation mark, however often it was escaped; `<b>` away."""
    while (unescaped := html.unescape(caption)) != caption:
        caption = unescaped
    return TAG.sub(" ", caption)


def normalise_unicode(caption: str) -> str:
    """NFC."""
    return unicodedata.normalize("NFC", caption)


def strip_control(caption: str) -> str:
    """Take away what shows nothing. White space stays, and so do the two joiners, which spell words and compose emoji."""
    return CONTROL.sub("", caption)


def strip_urls(caption: str) -> str:
    """Take away web and mail addresses, and bare domains of the common kinds."""
    return URL.sub(" ", caption)


def strip_file_names(caption: str) -> str:
    """Take away names that cameras give to files, and any other name with the ending of a picture's."""
    return FILE_NAME.sub(" ", caption)


def strip_camera(caption: str) -> str:
    """Take away makes with their models where they stand alone between separators or after `taken with`, and exposures anywhere."""
    for pattern in CAMERA:
        caption = pattern.sub(" ", caption)
    return caption


def strip_boilerplate(caption: str) -> str:
    """Take away what agencies and galleries add to every caption."""
    return BOILERPLATE.sub(" ", caption)


def strip_sizes(caption: str) -> str:
    """Take away pixel counts, print resolutions and file sizes."""
    return SIZE.sub(" ", caption)


def strip_dates(caption: str) -> str:
    """Take away days, and months with their year, and times of day."""
    return DATE.sub(" ", caption)


def tidy_punctuation(caption: str) -> str:
    """Take away brackets around nothing, all but the first of several separators, separators at the ends, spaces before commas and stops."""
    if "(" in caption or "[" in caption or "{" in caption:
        caption = EMPTY_BRACKETS.sub("", caption)
    caption = STRAY_SPACE.sub(r"\1", REPEATED.sub(r"\1\2", caption)).lstrip(LEADING)
    while caption.startswith(".") and caption[1:2] in SPACES:  # the end of a sentence that is gone; ".5" stays
        caption = caption[1:].lstrip(LEADING)
    return caption.rstrip(TRAILING)


def collapse_spaces(caption: str) -> str:
    """Any run of Unicode's white space to one space, none at the ends."""
    return " ".join(caption.split())


@dataclass(frozen=True)
class Rule:
    """One way to clean a caption."""

    clean: Callable[[str], str]
    trigger: str
    """RE2, without regard to case: found in every caption that `clean` changes."""


Mask = NDArray[np.bool_]
EXAMPLES: Final = 2
_S: Final = r"[\t-\r ]"  # RE2's \s has no vertical tab
_SEPARATOR: Final = r"[,;:|•·–—/\-]"
CLEANING: Final[Mapping[str, Rule]] = {
    "unescape_html": Rule(unescape_html, r"&|<"),
    "normalise_unicode": Rule(normalise_unicode, r"[^\x00-\x{2ff}]"),  # all before U+0300 is normal in any order
    "strip_control": Rule(strip_control, INVISIBLE_RE2),
    "strip_urls": Rule(strip_urls, r"://|www\.|@|\.(com|net|org|info|biz|edu|gov|co\.)"),
    "strip_file_names": Rule(
        strip_file_names,
        r"\.(jpe?g|jpe|png|gif|webp|tif|bmp|svg|hei[cf]|raw|cr[23w]|nef|arw|dng|orf|rw2|psd)|\d{6}[\-_]|p\d{7}|gx\d{6}"
        r"|(img|dsc[nf]?|pict|cimg|imgp|hpim|kif|sany|mvi|gopr|_mg_|sam|wp|pxl|scan|screenshot)[\-_ ]?\d{3}",
    ),
    "strip_camera": Rule(
        strip_camera,
        rf"f{_S}?/|1/\d|iso|canon|nikon|sony|fuji|olympus|panasonic|pentax|leica|hasselblad|kodak|minolta|ricoh|casio",
    ),
    "strip_boilerplate": Rule(
        strip_boilerplate,
        r"stock|royalty|getty|alamy|dreamstime|photos|123rf|flickr|pinterest|unsplash|pixabay|pexels|wikipedia|wikimedia|smugmug|500px|deviantart"
        r"|download|click|rights|copyright|©|\(c\)|courtesy|credit|thumbnail",
    ),
    "strip_sizes": Rule(strip_sizes, rf"\d{_S}?(x|×|\*|[kmg]b|dpi|ppi|px|pixel|mp|mega)"),
    "strip_dates": Rule(
        strip_dates, r"\d[\-/.]\d+[\-/.]\d|\d:\d\d(:|[\t-\r ]?[ap])|(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[^|]*(18|19|20)\d\d"
    ),
    "tidy_punctuation": Rule(
        tidy_punctuation,
        rf"^[\t-\r _|,;:/\\•·*~#+=>.!?–—\-]|[\t-\r _|,;:/\\•·*~#+=<–—\-]$|{_SEPARATOR}{_S}+{_SEPARATOR}|[,;:|•·][,;:|•·]|{_S}[,.;:!?]({_S}|$)"
        rf"|[(\[{{]{_S}*[)\]}}]",
    ),
    "collapse_spaces": Rule(collapse_spaces, rf"{_S}{_S}|^{_S}|{_S}$|[\t-\r{WIDE_RE2}]"),
}
"""In the order in which they run. `CaptionRules` has a switch for each."""


@dataclass(frozen=True)
class Cleaned:
    """Captions, and how many each rule changed."""

    captions: pa.Array
    changed: dict[str, int]
    """By rule, those that changed any only; `max_characters` where captions were cut."""
    examples: dict[str, tuple[tuple[str, str], ...]]
    """By rule, the first captions that it changed: raw, and cleaned by all rules."""


def clean_captions(captions: pa.Array, config: CaptionConfig) -> Cleaned:
    """Clean captions (strings, null counts as empty). Nothing is raised for any text."""
    encoded = pc.fill_null(captions, "").dictionary_encode()
    texts, rows = encoded.dictionary, encoded.indices.to_numpy()
    shared = np.bincount(rows, minlength=len(texts))
    rules = {name: rule for name, rule in CLEANING.items() if getattr(config.rules, name)}
    changed: dict[str, Mask] = {name: np.zeros(len(texts), bool) for name in ("max_characters", *rules)}
    active = np.arange(len(texts))
    while len(active):
        before = after = texts.take(active)
        after = _apply(after, _cut(after, config.max_characters), active, changed["max_characters"])
        for name, rule in rules.items():
            hit = np.flatnonzero(pc.match_substring_regex(after, rule.trigger, ignore_case=True).to_numpy(zero_copy_only=False))
            cleaned = [rule.clean(text) for text in after.take(hit).to_pylist()]
            after = _apply(after, (hit, cleaned), active, changed[name])
        moved = pc.not_equal(before, after).to_numpy(zero_copy_only=False)
        if not moved.any():
            break
        mask = np.zeros(len(texts), bool)
        mask[active[moved]] = True
        texts = pc.replace_with_mask(texts, mask, after.filter(pa.array(moved)))
        active = active[moved]
    counts = {name: int(shared[mask].sum()) for name, mask in changed.items() if mask.any()}
    shown = {name: pa.array(np.flatnonzero(changed[name])[:EXAMPLES]) for name in counts}
    examples = {
        name: tuple(zip(encoded.dictionary.take(places).to_pylist(), texts.take(places).to_pylist(), strict=True))
        for name, places in shown.items()
    }
    return Cleaned(texts.take(pa.array(rows)), counts, examples)


def _cut(texts: pa.Array, limit: int) -> tuple[NDArray[np.intp], list[str]]:
    """Positions of the captions that are too long, and their beginnings."""
    long = np.flatnonzero(pc.greater(pc.utf8_length(texts), limit).to_numpy(zero_copy_only=False))
    return long, [text[:limit] for text in texts.take(long).to_pylist()]


def _apply(texts: pa.Array, found: tuple[NDArray[np.intp], Sequence[str]], active: NDArray[np.intp], changed: Mask) -> pa.Array:
    """Put cleaned texts at their positions, and mark those that differ as changed by the rule."""
    positions, cleaned = found
    if not len(positions):
        return texts
    new = pa.array(cleaned, pa.string())
    differs = pc.not_equal(texts.take(positions), new).to_numpy(zero_copy_only=False)
    if not differs.any():
        return texts
    mask = np.zeros(len(texts), bool)
    mask[positions[differs]] = True
    changed[active[mask]] = True
    return pc.replace_with_mask(texts, mask, new.filter(pa.array(differs)))


def empty(captions: pa.Array, _config: CaptionConfig) -> pa.Array:
    """Nothing is left."""
    return pc.equal(pc.binary_length(captions), 0)


def too_short(captions: pa.Array, config: CaptionConfig) -> pa.Array:
    """Fewer than `min_characters`."""
    return pc.less(pc.utf8_length(captions), config.min_characters)


def all_numbers(captions: pa.Array, _config: CaptionConfig) -> pa.Array:
    """Not one letter."""
    return pc.invert(pc.match_substring_regex(captions, r"\p{L}"))


def wrong_script(captions: pa.Array, config: CaptionConfig) -> pa.Array:
    """Fewer than half of its letters are of the allowed scripts; ASCII's are Latin."""
    known = "".join(rf"\p{{{script}}}" for script in config.scripts)
    if "Latin" not in config.scripts:
        return _mostly(captions, known)
    foreign = pc.match_substring_regex(captions, r"[^\x00-\x7f]")
    return pc.replace_with_mask(pa.array(np.zeros(len(captions), bool)), foreign, _mostly(captions.filter(foreign), known))


def _mostly(captions: pa.Array, known: str) -> pa.Array:
    letters = pc.replace_substring_regex(captions, r"[^\p{L}]+", "")
    own = pc.replace_substring_regex(letters, f"[^{known}]+", "")
    return pc.less(pc.multiply(pc.utf8_length(own), 2), pc.utf8_length(letters))


DROPPING: Final[Mapping[str, Callable[[pa.Array, CaptionConfig], pa.Array]]] = {
    "empty": empty,
    "too_short": too_short,
    "all_numbers": all_numbers,
    "wrong_script": wrong_script,
}
"""True where a cleaned caption is dropped."""

assert {*CLEANING, *DROPPING} == {*CaptionRules.model_fields}
