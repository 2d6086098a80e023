"""Settings on the command line: KEY=VALUE."""

import argparse
import json
from typing import Any


def key_value(text: str) -> tuple[str, Any]:
    """Key and value of KEY=VALUE, for argparse; the value is JSON where it can be.

    >>> key_value("steps=300"), key_value("pattern=a b")
    (('steps', 300), ('pattern', 'a b'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value
