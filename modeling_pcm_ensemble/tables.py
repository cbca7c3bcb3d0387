"""Numbers as text: Markdown tables, and means with their intervals."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    return "\n".join([_line(header), "|---" * len(header) + "|", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def number_interval(interval: Sequence[float]) -> str:
    """Write a number and the ends of its interval: `0.621 [0.580, 0.664]`."""
    mean, low, high = interval
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def percent_interval(interval: Sequence[float]) -> str:
    """Write a share and the ends of its interval: `66.1 % [61.0, 71.2]`."""
    mean, low, high = (100 * value for value in interval)
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def signed_interval(interval: Sequence[float]) -> str:
    """Write a difference and the ends of its interval: `+0.062 [+0.024, +0.099]`."""
    mean, low, high = interval
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


__all__ = ["number_interval", "percent_interval", "signed_interval", "table"]
