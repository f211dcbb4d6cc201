"""Text that fits its place on a picture, measured with the font that draws it."""

from __future__ import annotations

from ijepa_scale.data.class_names import shortened


def width_of(text: str, points: float, *, bold: bool = False) -> float:
    """Returns the width of one line of text, in inches, at a font size."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=points, weight="bold" if bold else "normal")
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return width / 72


def fitted(text: str, points: float, inches: float, *, bold: bool = False) -> str:
    """Returns the text in one line, its middle left out if it is wider than `inches`."""
    length = len(text)
    while length > 1 and width_of(shortened(text, length), points, bold=bold) > inches:
        length = min(length - 1, int(length * inches / width_of(shortened(text, length), points, bold=bold)) + 1)
    return shortened(text, length)


def wrapped(text: str, points: float, inches: float) -> list[str]:
    """Returns the words of a text in lines of at most `inches`."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer, points) <= inches:
            lines[-1] = longer
        else:
            lines.append(fitted(word, points, inches))
    return lines
