"""Numbers with units, as tables and pictures show them: bytes in powers of 1,024, all else in powers of 1,000."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """`count` with three digits and a binary unit: 512 B, 41.0 KiB, 1.50 GiB."""
    size, unit = float(count), ""
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 999.5:
            break
        size, unit = size / 1024, larger
    return f"{three_digits(size)} {unit}" if unit else f"{count} B"


def format_count(count: float) -> str:
    """`count` with three digits and a decimal suffix: 512, 1.37 G."""
    size, suffix = float(count), ""
    for larger in (" k", " M", " G", " T", " P", " E", " Z", " Y"):
        if size < 999.5:
            break
        size, suffix = size / 1000, larger
    return f"{three_digits(size)}{suffix}" if suffix else f"{count:g}"


def three_digits(size: float) -> str:
    """`size`, below 1,000, with three digits: 2.50, 31.4, 870."""
    return f"{size:#.3g}".rstrip(".")
