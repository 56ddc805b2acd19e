"""What is stripped from captions, as patterns. Each takes time in proportion to the caption, or to the length of its longest word.

They look at ASCII letters and digits only (`re.ASCII`), so that what they find does not move with Python's version of Unicode.
"""

import re
from typing import Final

_FLAGS: Final = re.ASCII | re.IGNORECASE

TAG: Final = re.compile(r"<(?:/?[a-z][a-z0-9]*(?:\s[^<>]*)?/?|!--[^<>]*)>", _FLAGS)

_INVISIBLE: Final = (
    r"\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ue000-\uf8ff\ufeff\ufff0-\uffff"
    r"\U000e0000-\U000e00ff\U000f0000-\U0010ffff"
)
CONTROL: Final = re.compile(rf"[{_INVISIBLE}\ud800-\udfff]")
_WIDE: Final = r"\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""White space to `str.split`, but for that of ASCII proper."""


def as_re2(ranges: str) -> str:
    """The same ranges of characters as RE2 writes them, which has no `\\u`."""
    return re.sub(r"\\(?:u|U000|U00)([0-9a-f]+)", r"\\x{\1}", ranges)


INVISIBLE_RE2: Final = f"[{as_re2(_INVISIBLE)}]"
WIDE_RE2: Final = as_re2(_WIDE)

_END: Final = r"[^\s<>\"'.,;:!?)\]}|]"  # an address does not end with the sentence's punctuation
URL: Final = re.compile(
    rf"(?:\b[a-z][a-z0-9+.-]{{1,9}}://|\bwww\.)(?:[^\s<>\"']*{_END})?"
    r"|\b[a-z0-9._%+-]{1,64}@[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){1,4}\b"
    rf"|\b(?:[a-z0-9-]{{1,63}}\.){{1,4}}(?:com|net|org|info|biz|edu|gov|co\.[a-z]{{2}})\b(?:/(?:[^\s<>\"']*{_END})?)?",
    _FLAGS,
)

_PICTURE: Final = r"(?:jpe?g|jpe|png|gif|webp|tiff?|bmp|svg|hei[cf]|raw|cr[23w]|nef|arw|dng|orf|rw2|psd)"
FILE_NAME: Final = re.compile(
    rf"(?<![^\s,;|()\[\]])[^\s,;|()\[\]]{{0,200}}\.{_PICTURE}\b"
    r"|(?<![a-z0-9])(?:_?(?:IMG|DSC[NF]?|PICT|CIMG|IMGP|HPIM|KIF|SANY|MVI|GOPR)[-_ ]?\d{3,14}|_MG_\d{3,8}|(?:SAM|WP|PXL|Scan|Screenshot)[-_]\d{3,14}"
    r"|P\d{7}|GX\d{6})(?:[-_]\w{1,20}){0,9}\b"
    r"|(?<!\S)\d{6,20}[-_]\w{2,40}(?!\S)",
    _FLAGS,
)

_MODEL: Final = (
    r"(?:Canon|Nikon|Sony|Fuji(?:film)?|Olympus|Panasonic|Pentax|Leica|Hasselblad|Kodak|(?:Konica\s+)?Minolta|Ricoh|Casio)(?:\s+Corporation)?\s+"
    r"(?:(?:EOS|PowerShot|IXUS|Coolpix|Alpha|Cyber-?shot|FinePix|Camedia|Stylus|Lumix|Optio|EasyShare|Dynax|Exilim|GR)\b|[a-z*]{0,5}-?\d[-\w]{0,12})"
    r"(?:\s+(?:[-\w]{0,6}\d[-\w]{0,8}|Mark|Mk|II|III|IV|V|Digital|Rebel|Kiss|Ti|Pro|Plus)\b){0,5}"
)
_BEFORE: Final = r"(?:^|(?<=[,;|(\[/•·:–—])|(?<=\s-))\s*"
_AFTER: Final = r"\s*(?=$|[,;|)\]/•·:–—]|\.\s|\.$|-\s)"
CAMERA: Final = (
    re.compile(rf"\b(?:taken|shot|captured|photographed)\s+(?:with|on|using)\s+(?:an?\s+|my\s+|the\s+)?{_MODEL}", _FLAGS),
    re.compile(rf"{_BEFORE}(?:camera:?\s+)?{_MODEL}(?:\s+(?:DSLR|camera)\b)?{_AFTER}", _FLAGS),
    re.compile(r"\b\d{1,4}(?:\.\d)?(?:-\d{1,4})?\s?mm(?=[\s,;|@]{0,4}f\s?/\s?\d)", _FLAGS),
    re.compile(r"(?<![a-z0-9])f\s?/\s?\d{1,2}(?:[.,]\d{1,2})?\b", _FLAGS),
    re.compile(r"(?<![\d/])1/\d{1,5}\s?(?:s|secs?|seconds?)\b", _FLAGS),
    re.compile(r"\bISO[\s:-]?(?:\d{1,5}[05]|64)\b", _FLAGS),
)

_AGENCY: Final = (
    r"Getty\s?Images(?:\s?Plus)?|Shutterstock|iStock(?:photo)?|Alamy(?:\s+Live\s+News)?|Adobe\s?Stock|Dreamstime|Deposit\s?photos|123RF|Big\s?stock(?:photo)?"
    r"|Can\s?Stock\s?Photo|Flickr|Pinterest|Unsplash|Pixabay|Pexels|Wikimedia(?:\s+Commons)?|Wikipedia|SmugMug|500px|DeviantArt"
)
_KIND: Final = r"(?:photos?|photography|photographs?|images?|pictures?|illustrations?|vectors?|footage|videos?|clipart|art|graphics?)"
BOILERPLATE: Final = re.compile(
    rf"\b(?:royalty[\s-]?free\s+)?(?:rights[\s-]managed\s+)?(?:premium\s+)?stock\s+{_KIND}(?:\s+(?:and|&)\s+{_KIND})?\b"
    rf"|\broyalty[\s-]?free\b(?:\s+{_KIND}\b)?"
    rf"|(?:\b(?:(?:photo|image|picture)\s+)?(?:from|by|via|on|at|courtesy\s+of|credit:?)\s+)?\b(?:{_AGENCY})(?!\w)(?:\s*[™®])?"
    rf"|\b(?:free\s+)?download\s+(?:now|free|this\s+{_KIND}|{_KIND})\b|\bfree\s+download\b"
    r"|\bclick\s+(?:here\s+)?(?:to|for)\s+(?:enlarge|view|zoom|larger(?:\s+image)?|a\s+larger\s+(?:image|view|version))\b"
    r"|\ball\s+rights\s+reserved\b|(?:\bcopyright\b\s*)?(?:©|\(c\))(?:\s*(?:19|20)\d\d(?:\s?[-–]\s?(?:19|20)\d\d)?\b)?|\bcopyright\s+(?:19|20)\d\d\b"
    r"|\b(?:image|photo|picture)\s+(?:credit|courtesy)\s*:|\bthumbnail\s+(?:for|of)\b",
    _FLAGS,
)

SIZE: Final = re.compile(
    r"(?<![\d.,])\d{3,5}\s?[x×*]\s?\d{3,5}(?:\s?(?:px|pixels?)\b)?(?!\d)"
    r"|\b\d{2,5}\s?(?:px|pixels|dpi|ppi)\b"
    r"|\b\d{1,4}(?:[.,]\d{1,3})?\s?(?:[KMG]B|MP|megapixels?)\b",
    _FLAGS,
)

_MONTH: Final = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
_YEAR: Final = r"(?:1[89]|20)\d\d"
DATE: Final = re.compile(
    rf"(?:\b(?:on|dated)\s+)?(?<![\w.,/-])(?:{_YEAR}[-/.]\d{{1,2}}[-/.]\d{{1,2}}|\d{{1,2}}[-/.]\d{{1,2}}[-/.](?:{_YEAR}|\d\d))(?:T[\d:.]+Z?)?(?![\w/-]|[.,]\d)"
    rf"|(?:\b(?:on|in|dated)\s+)?\b(?:(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day,?\s+)?"
    rf"(?:(?:the\s+)?\d{{1,2}}(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH},?\s+{_YEAR}|{_MONTH}\s+(?:\d{{1,2}}(?:st|nd|rd|th)?,?\s+)?{_YEAR})\b"
    r"|(?:\bat\s+)?(?<![\w:.])(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d(?![\w:])|\s?[ap]\.?m\b\.?)",
    _FLAGS,
)

EMPTY_BRACKETS: Final = re.compile(r"\(\s*\)|\[\s*\]|\{\s*\}", _FLAGS)
REPEATED: Final = re.compile(r"([,;:|•·–—/-])(?<![^\s,;:|•·][,;:|•·–—/-])(?:\s+[,;:|•·–—/-])+(?=\s|$)|([,;:|•·])(?:\s*[,;:|•·])+", _FLAGS)
STRAY_SPACE: Final = re.compile(r"\s+([,.;:!?])(?!\S)", _FLAGS)
SPACES: Final = " \t\n\r\f\v"
LEADING: Final = SPACES + r"_|,;:/\•·*~#+=>!?–—-"
TRAILING: Final = SPACES + r"_|,;:/\•·*~#+=<–—-"
"""Characters that do not begin, or end, a caption."""
