"""Pieces of HTML that the tables of a report are made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any


def section(title: str, *parts: str) -> list[str]:
    """A heading with what stands under it, or nothing where that is empty."""
    return [f"<h2>{title}</h2>", *parts] if any(parts) else []


def table(heads: Sequence[str], align: str, rows: Sequence[str]) -> str:
    """A table, or nothing at all where it would have no rows."""
    return f"<table>{row(heads, align, cell='th')}{''.join(rows)}</table>" if rows else ""


def row(cells: Sequence[str], align: str, style: str = "", cell: str = "td") -> str:
    """A row of HTML cells; ``align`` has a letter for each: l(eft) or n(umber)."""
    inner = "".join(f'<{cell} class="{side}">{text}</{cell}>' for text, side in zip(cells, align, strict=True))
    return f'<tr class="{style}">{inner}</tr>'


def plan_label(name: str, colors: dict[str, str]) -> str:
    """A plan with its colour in the pictures before it."""
    color = colors.get(name, "transparent")
    return f'<span class="swatch" style="background:{color}"></span>{escape(name)}'


def percent(fraction: Any) -> str:
    """``+1.3 %``; - where the log has null."""
    return "-" if fraction is None else f"{100 * fraction:+.1f} %"


def number(value: Any) -> str:
    """Four digits; - where the log has null."""
    return "-" if value is None else f"{value:.4g}"
