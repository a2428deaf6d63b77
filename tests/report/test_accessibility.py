"""Accessibility of the pages by their source: contrast, names, language and phone layout, without a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import rluf

REPORT_FOLDER = Path(rluf.__file__).parent / "report"
STYLE = (REPORT_FOLDER / "report_style.html.j2").read_text("utf-8")
TEMPLATES = sorted(Path(rluf.__file__).parent.glob("**/*.html.j2"))
MIN_TEXT_CONTRAST, MIN_MARK_CONTRAST = 4.5, 3.0
"""WCAG 2.2, success criteria 1.4.3 (text) and 1.4.11 (graphical objects)."""
TEXT_PAIRS = [
    *((text, ground) for text in ("ink", "muted", "aligned") for ground in ("paper", "card")),
    *((f"{status}", f"{status}-soft") for status in ("pass", "warn", "fail")),
    *(("ink", ground) for ground in ("pass-soft", "warn-soft", "fail-soft", "base-soft", "aligned-soft")),
    *((change, "card") for change in ("pass", "fail")),
]
MARK_PAIRS = [(mark, "card") for mark in ("base", "aligned", "warn", "phase1", "phase2", "phase3", "phase4")]
PHONE_WIDTH = 390


def read_colors() -> dict[str, dict[str, str]]:
    """Colors by style and name; dark inherits what it does not define."""
    blocks = re.findall(r":root \{(.*?)\n *\}", STYLE, re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", block)) for block in blocks)
    return {"light": light, "dark": light | dark}


def compute_luminance(color: str) -> float:
    """Relative luminance of #rrggbb after WCAG 2.2."""
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def compute_contrast(first_color: str, second_color: str) -> float:
    dark, light = sorted((compute_luminance(first_color), compute_luminance(second_color)))
    return (light + 0.05) / (dark + 0.05)


def test_the_contrast_formula_gives_known_values() -> None:
    assert compute_contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert compute_contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("style", ["light", "dark"])
@pytest.mark.parametrize(
    ("front", "ground", "minimum"),
    [(*pair, MIN_TEXT_CONTRAST) for pair in TEXT_PAIRS] + [(*pair, MIN_MARK_CONTRAST) for pair in MARK_PAIRS],
)
def test_text_and_marks_have_enough_contrast(style: str, front: str, ground: str, minimum: float) -> None:
    colors = read_colors()[style]
    contrast = compute_contrast(colors[front], colors[ground])
    assert contrast >= minimum, f"{front} on {ground} in the {style} style: {contrast:.2f}"


def test_every_color_of_text_is_one_of_the_checked_pairs() -> None:
    used = set(re.findall(r"[{;] ?color: var\(--([\w-]+)\)", STYLE))
    assert used and used <= {front for front, _ in TEXT_PAIRS}
    assert not re.search(r"[{;] ?color: #", STYLE)  # a color outside :root would have no dark style


def list_declarations() -> Iterator[tuple[str, str, float]]:
    """Every (rule, property, pixels) that fixes a width."""
    for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", STYLE):
        for name, pixels in re.findall(r"(?<![\w-])((?:min-)?width): ([\d.]+)px", body):
            yield selector.strip(), name, float(pixels)


def test_nothing_is_wider_than_a_phone() -> None:
    assert [row for row in list_declarations() if row[2] > PHONE_WIDTH - 2 * 24] == []
    # A grid column of fixed minimum width must give way on a narrow screen.
    for minimum in re.findall(r"minmax\(([^)]*\)?)", STYLE):
        assert minimum.startswith("min(100%"), minimum


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_plots_tables_and_scroll_areas_have_names(template: Path) -> None:
    text = template.read_text("utf-8")
    for tag in re.findall(r"<(?:div|section)[^>]*class=\"(?:scroll|\{\{ scroll_class)[^>]*>", text):
        # A keyboard can scroll only what takes the focus, and a screen reader then says its name.
        assert 'role="region"' in tag and "aria-label=" in tag and 'tabindex="0"' in tag, tag
    for tag in re.findall(r"<div class=\"plot\"[^>]*>", text):
        assert 'role="img"' in tag and "aria-label=" in tag, tag
    for tag in re.findall(r"<nav[^>]*>", text):
        assert "aria-label=" in tag, tag
    for tag in re.findall(r"<th\b[^>]*>", text):
        assert "scope=" in tag, tag
    for tag in re.findall(r"<img\b[^>]*>", text):
        assert "alt=" in tag, tag
    for identifier in re.findall(r"<(?:input|select|textarea)\b[^>]*id=\"([\w-]+)\"", text):
        wrapped = re.search(rf'<label>[^<]*<\w+ id="{identifier}"', text)
        assert f'for="{identifier}"' in text or wrapped, identifier


def test_every_page_states_its_language_and_viewport() -> None:
    pages = [path for path in TEMPLATES if "<html" in path.read_text("utf-8")]
    assert pages
    for page in pages:
        text = page.read_text("utf-8")
        assert '<html lang="en"' in text and 'name="viewport" content="width=device-width' in text, page
        assert "user-scalable" not in text and "maximum-scale" not in text, page


def test_motion_stops_for_readers_who_ask_for_it() -> None:
    assert "scroll-behavior" not in STYLE or "prefers-reduced-motion: reduce" in STYLE
    assert not re.search(r"outline: (?:none|0)", STYLE)
