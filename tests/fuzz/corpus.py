"""Files that are wrong, for every command that reads such a file."""

import json
import pathlib
import struct
from collections.abc import Callable

Make = Callable[[pathlib.Path], object]


def _text(content: str | bytes) -> Make:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda path: path.write_bytes(data)


DOCUMENTS: dict[str, Make] = {
    "empty": _text(""),
    "zeros": _text(b"\x00" * 100),
    "a scalar": _text("7"),
    "null": _text("null"),
    "a list": _text("[1, 2]"),
    "unclosed": _text('{"a": '),
    "deep lists": _text("[" * 100_000),
    "deep mappings": _text('{"a":' * 100_000),
    "aliases": _text(
        "a: &a [1]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(30)) + "c: *b29\n"
    ),
    "long number": _text('{"a": ' + "9" * 100_000 + "}"),
    "long key": _text('{"' + "k" * 1_000_000 + '": 1}'),
    "repeated key": _text('{"a": 1, "a": 2}'),
    "wrong keys": _text(json.dumps({f"key{i}": i for i in range(10_000)})),
    "tags": _text("!!python/object/apply:os.system ['true']"),
}
"""Content of configs and policies."""

RECORDS: dict[str, Make] = {
    "empty": _text(""),
    "no Unicode": _text(b'{"prompt": "\xff", "answer": "a"}\n'),
    "no object": _text("7\n"),
    "unclosed": _text('{"prompt": "a\n'),
    "deep": _text('{"prompt": ' + "[" * 100_000 + "\n"),
    "null": _text('{"prompt": null, "answer": null}\n'),
    "numbers": _text('{"prompt": 1, "answer": 2}\n'),
    "no columns": _text('{"x": "a"}\n'),
    "no answer": _text('{"prompt": "a"}\n'),
    "roles": _text('{"messages": [{"role": 7, "content": "a"}], "answer": "b"}\n'),
    "long": _text(json.dumps({"x": "y" * 5_000_000}) + "\n"),
}
"""Content of a data file in JSON lines."""


def _header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _entry(**fields: object) -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}
    return _header(json.dumps({"model.embed_tokens.weight": entry}).encode(), b"\x00" * 4)


WEIGHTS: dict[str, bytes] = {
    "empty": b"",
    "a pickle": b"\x80\x04\x95" + b"\x00" * 100,
    "a long header": struct.pack("<Q", 1 << 62),
    "no JSON": _header(b"{"),
    "deep": _header(b"[" * 50_000),
    "a list": _header(b"[]"),
    "huge": _entry(shape=[1 << 40, 1 << 20]),
    "negative": _entry(shape=[-1]),
    "beyond the end": _entry(data_offsets=[0, 1 << 50]),
    "another dtype": _entry(dtype="X9"),
    "texts": _entry(shape="many"),
}
"""Content of `model.safetensors`."""

CONFIGS: dict[str, object] = {
    "no object": [],
    "no family": {},
    "another family": {"model_type": "x" * 100_000},
    "a list for a family": {"model_type": ["qwen3"]},
    "texts": {"hidden_size": "many"},
    "negative": {"num_hidden_layers": -1},
    "zero heads": {"num_attention_heads": 0},
    "fractions": {"hidden_size": 31.5},
    "nothing": {"vocab_size": None},
}
"""What replaces keys of `config.json`; one without an object replaces it all."""

ADAPTERS: dict[str, object] = {
    "no object": [],
    "nothing": {},
    "a bomb": {"r": 2, "lora_alpha": 2, "target_modules": r"(([a-z_.0-9]+)+)+!"},
    "no expression": {"r": 2, "lora_alpha": 2, "target_modules": "("},
    "rank": {"r": -1, "lora_alpha": 2, "target_modules": ["q_proj"]},
    "texts": {"r": "two", "lora_alpha": 2, "target_modules": ["q_proj"]},
    "no modules": {"r": 2, "lora_alpha": 2, "target_modules": ["nothing_proj"]},
}
"""Content of `adapter_config.json`."""
