"""Numbers as text, rounded without losing the digits that matter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

__all__ = ["labels", "nats", "percent", "rounded"]


def labels(name: str, shape: Sequence[int]) -> list[str]:
    """Return the names of all numbers of a site, in the order of its memory.

    Example::

        >>> labels("z", ()), labels("z", (1, 2))
        (['z'], ['z[0, 0]', 'z[0, 1]'])
    """
    indices = itertools.product(*map(range, shape))
    return [f"{name}[{', '.join(map(str, index))}]" if index else name for index in indices]


def nats(value: float) -> str:
    """Return a log density with three digits after the point, a very large one with six digits.

    Example::

        >>> nats(-176543.21849), nats(-4.7988e32)
        ('-176543.218', '-4.7988e+32')
    """
    return f"{value:.3f}" if abs(value) < 1e7 else f"{value:.6g}"


def rounded(value: float, digits: int = 3) -> str:
    """Return a number in few digits, in more where it is not 1 and would read as 1.

    Example::

        >>> rounded(0.25), rounded(0.99996), rounded(1.0)
        ('0.25', '0.99996', '1')
    """
    while digits < 15 and value != 1 and float(f"{value:.{digits}g}") == 1:
        digits += 1
    return f"{value:.{digits}g}"


def percent(share: float) -> str:
    """Return a share in percent, with digits after the point near 0 and 1.

    Example::

        >>> percent(0.123), percent(0.0123), percent(0.9987), percent(0.00004), percent(1.0)
        ('12%', '1.2%', '99.9%', '0.004%', '100%')
    """
    from_end = min(share, 1 - share)
    if from_end <= 0 or from_end >= 0.095:
        return f"{share:.0%}"
    if from_end >= 0.00095:
        return f"{share:.1%}"
    return f"{100 * share:.1g}%" if share < 0.5 else f"{share:.3%}"
