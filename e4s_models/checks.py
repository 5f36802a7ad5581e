"""Shape checks at the entry points of public functions."""

from __future__ import annotations

from typing import Protocol


class HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def check_shape(value: HasShape, pattern: str) -> dict[str, int]:
    """Check an array or tensor against a pattern such as "B 3 H W"; letters bind, numbers must match.

    Returns the bound letters. Raises ValueError that quotes what arrived.
    """
    names, shape = pattern.split(), tuple(value.shape)
    bound: dict[str, int] = {}
    fits = len(names) == len(shape) and all(
        int(name) == size if name.isdigit() else bound.setdefault(name, size) == size for name, size in zip(names, shape, strict=False)
    )
    if not fits:
        raise ValueError(f"expected shape ({', '.join(names)}), got {shape}")
    return bound
