"""The picture of teacher against students: a row a prompt, a column a model and step count, with labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from stages.evaluate.rows import TEACHER, Row

Pixels = NDArray[np.uint8]

INK: Final = (24, 28, 36)
MUTED: Final = (98, 106, 120)
PAPER: Final = (255, 255, 255)
RULE: Final = (216, 220, 228)
_SMALLEST_CELL, _LARGEST_CELL = 128, 256
_GAP, _GROUP_GAP, _MARGIN, _PROMPT_WIDTH, _HEADER = 6, 22, 20, 190, 58


@dataclass(frozen=True)
class Group:
    """Columns of one step count, side by side."""

    steps: int
    rows: tuple[Row, ...]


def grid_groups(rows: Sequence[Row]) -> tuple[Group, ...]:
    """Columns of the picture: the reference teacher first, then by falling step count the teacher beside the students of that count."""
    reference = rows[0]
    counts = sorted({row.steps for row in rows if row.model != TEACHER}, reverse=True)
    if not counts:
        return tuple(Group(row.steps, (row,)) for row in rows)
    groups = [Group(reference.steps, (reference,))]
    for steps in counts:
        found = tuple(row for row in rows if row.steps == steps and row is not reference)
        groups.append(Group(steps, found))
    return tuple(groups)


def thumbnail(pixels: Pixels) -> Image.Image:
    """A cell of the grid: small pictures are enlarged by a whole factor with their pixels kept, large ones reduced to 256 px."""
    picture = Image.fromarray(pixels)
    side = max(picture.size)
    if side < _SMALLEST_CELL:
        factor = max(1, _SMALLEST_CELL // side)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if side <= _LARGEST_CELL:
        return picture
    scale = _LARGEST_CELL / side
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)


def draw_grid(prompts: Sequence[str], groups: Sequence[Group], pictures: Sequence[Sequence[Sequence[Pixels]]]) -> Image.Image:
    """Draw the grid. `pictures[group][column][prompt]` are RGB (H, W, 3), all of one size."""
    cells = [[[thumbnail(picture) for picture in column] for column in group] for group in pictures]
    width, height = cells[0][0][0].size
    columns = sum(len(group.rows) for group in groups)
    total_width = 2 * _MARGIN + _PROMPT_WIDTH + columns * (width + _GAP) + len(groups) * _GROUP_GAP - _GAP
    total_height = 2 * _MARGIN + _HEADER + len(prompts) * (height + _GAP) - _GAP
    canvas = Image.new("RGB", (total_width, total_height), PAPER)
    draw = ImageDraw.Draw(canvas)
    title, small = ImageFont.load_default(17), ImageFont.load_default(13)

    for number, prompt in enumerate(prompts):
        top = _MARGIN + _HEADER + number * (height + _GAP)
        lines = wrap(draw, prompt, small, _PROMPT_WIDTH - 12, max_lines=max(1, (height - 8) // 18))
        draw.multiline_text((_MARGIN, top + height / 2), "\n".join(lines), fill=INK, font=small, anchor="lm", spacing=5)

    left = _MARGIN + _PROMPT_WIDTH
    for group, group_cells in zip(groups, cells, strict=True):
        left += _GROUP_GAP
        group_width = len(group.rows) * (width + _GAP) - _GAP
        steps = f"{group.steps} step" + ("s" if group.steps != 1 else "")
        draw.text((left, _MARGIN), steps, fill=INK, font=title)
        draw.line((left, _MARGIN + 27, left + group_width, _MARGIN + 27), fill=RULE, width=2)
        for row, column in zip(group.rows, group_cells, strict=True):
            label = wrap(draw, row.family, small, width, max_lines=1)[0]
            draw.text((left, _MARGIN + 34), label, fill=MUTED, font=small)
            for number, cell in enumerate(column):
                canvas.paste(cell, (left, _MARGIN + _HEADER + number * (height + _GAP)))
            left += width + _GAP
        left -= _GAP
    return canvas


def wrap(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Break a text into lines of at most `width` pixels; what does not fit in `max_lines` ends in an ellipsis."""
    lines = [""]
    for word in text.split() or [text]:
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    kept = [_fit(draw, line, font, width) for line in lines[:max_lines]]
    if len(lines) > max_lines:
        kept[-1] = _fit(draw, f"{lines[max_lines - 1]} …", font, width)
    return kept


def _fit(draw: ImageDraw.ImageDraw, line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if draw.textlength(line, font=font) <= width:
        return line
    while line and draw.textlength(line + "…", font=font) > width:
        line = line[:-1]
    return line.rstrip() + "…"
