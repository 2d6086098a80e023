"""Messages name the flag that was typed, not the field that it became."""

import argparse
import contextlib
from collections.abc import Iterator

_OTHERWISE = {
    "config_overrides": "--config-override",
    "drain_s": "--drain-seconds",
    "models": "MODEL",
    "num_requests": "--requests",
    "num_slots": "--slots",
    "path_or_hub_id": "MODEL",
    "request_s": "--request-seconds",
}
"""Fields whose flags have other names."""


def flag_of(field: str) -> str:
    """The flag of a field.

    >>> flag_of("num_slots"), flag_of("chunk_size")
    ('--slots', '--chunk-size')
    """
    return _OTHERWISE.get(field, "--" + field.replace("_", "-"))


@contextlib.contextmanager
def naming_flags(args: argparse.Namespace, **others: str) -> Iterator[None]:
    """Puts a flag in place of the field that a message of the block begins with.

    Args:
        args: with the command's flags; a field that has none keeps its name.
        others: flags by fields, where the command's own differ from the rest.
    """
    try:
        yield
    except ValueError as error:
        field, colon, said = str(error).partition(":")
        if not colon or field not in {**_OTHERWISE, **vars(args), **others}:
            raise
        raise ValueError(f"{others.get(field) or flag_of(field)}:{said}") from error
