"""Secrets of URLs and of settings, kept out of messages, reports and what runs write down."""

import json
import re
import shlex
import sys
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["HIDDEN", "redact", "redact_url", "typed_command", "without_secrets"]

HIDDEN = "(hidden)"
_URL = re.compile(r"(?i)\bhttps?://[^\s'\"<>]+")
_KEY = re.compile(r"(?i)(api_?key['\": =]+)[^,}\s]+")


def redact_url(url: str) -> str:
    """The URL without a user's name, password, the values of its query, and its fragment.

    >>> redact_url("https://me:secret@host/v1?key=abc")
    'https://host/v1?key=(hidden)'
    >>> redact_url("https://host/v1?abc")
    'https://host/v1?(hidden)'
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return HIDDEN
    told = [part.partition("=")[:2] for part in parts.query.split("&") if part]
    query = "&".join(f"{name}={HIDDEN}" if equals else HIDDEN for name, equals in told)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, query, ""))


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """A text without these secrets, those of its URLs, and what follows `api_key=`."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        quoted = urllib.parse.quote(secret, safe=""), urllib.parse.quote_plus(secret)
        for form in {secret, *quoted, json.dumps(secret)[1:-1]}:
            text = re.sub(re.escape(form), HIDDEN, text, flags=re.IGNORECASE)
    text = _URL.sub(lambda found: redact_url(found[0]), text)
    return _KEY.sub(rf"\1{HIDDEN}", text)


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without `api_key`, and without the secrets of their URLs."""
    return {
        name: redact(value) if isinstance(value, str) else value
        for name, value in settings.items()
        if name != "api_key"
    }


def typed_command() -> str:
    """What was typed, for reports."""
    return shlex.join(["swaa", *map(redact, sys.argv[1:])])
