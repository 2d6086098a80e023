"""The largest that fits, by bisection: each look at a size may be a minute of a compiler's work."""

from collections.abc import Callable

__all__ = ["largest"]


def largest(fits: Callable[[int], bool], *, guess: int, most: int) -> int:
    """The largest number from 1 to `most` that fits, where all below one that fits do; 0: none.

    From a guess it doubles its steps until the answer lies between two numbers, then halves: a
    good guess costs few looks.

    Args:
        fits: looks at one number.
        guess: where the answer may be.
        most: beyond which nothing is looked at.

    Examples:
        >>> asked = []
        >>> largest(lambda n: asked.append(n) or n <= 37, guess=35, most=1000), asked
        (37, [35, 36, 38, 37])
    """
    guess = min(max(guess, 1), most)
    step = 1
    if fits(guess):
        low, high = guess, most + 1
        while low + step < high:
            if not fits(low + step):
                high = low + step
                break
            low, step = low + step, 2 * step
    else:
        low, high = 0, guess
        while high - step > low:
            if fits(high - step):
                low = high - step
                break
            high, step = high - step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
