"""Files that are wrong, for every command that reads such a file."""

import json
import pathlib
import struct
from collections.abc import Callable
from typing import Any

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
    "a bomb of ranks": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "rank_pattern": {r"(([a-z_.0-9]+)+)+!": 4},
    },
    "no expression": {"r": 2, "lora_alpha": 2, "target_modules": "("},
    "a long expression": {"r": 2, "lora_alpha": 2, "target_modules": "a" * 1_000_000},
    "rank": {"r": -1, "lora_alpha": 2, "target_modules": ["q_proj"]},
    "a huge rank": {"r": 2**40, "lora_alpha": 2, "target_modules": ["q_proj"]},
    "texts": {"r": "two", "lora_alpha": 2, "target_modules": ["q_proj"]},
    "no modules": {"r": 2, "lora_alpha": 2, "target_modules": ["nothing_proj"]},
    "many modules": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": [f"nothing{number}" for number in range(100_000)],
    },
    "layers": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "layers_to_transform": [10**400],
    },
}
"""Content of `adapter_config.json`."""

GENERATION: dict[str, object] = {
    "texts": {"eos_token_id": "two"},
    "fractions": {"eos_token_id": [2.5]},
    "beyond the vocabulary": {"eos_token_id": 2**40},
    "a hot temperature": {"do_sample": True, "temperature": "hot"},
    "an infinite penalty": {"do_sample": True, "repetition_penalty": 10**400},
    "a negative penalty": {"do_sample": True, "repetition_penalty": -1},
    "tokens": {"do_sample": True, "suppress_tokens": "all"},
    "a huge n-gram": {"do_sample": True, "no_repeat_ngram_size": 2**70},
}
"""What is in `generation_config.json`."""

TEMPLATES: dict[str, Make] = {
    "no Unicode": _text(b"{{ messages }}\xff"),
    "unclosed": _text("{% for m in messages %}"),
    "unknown": _text("{{ nothing.at.all }}"),
    "a range": _text("{% for i in range(10**9) %}{{ i }}{% endfor %}"),
    "loops": _text("{% for i in messages %}{% for j in range(99999) %}" * 3 + "{% endfor %}" * 6),
    "a long text": _text("{{ 'x' * 10**9 }}"),
    "a power": _text("{{ 9 ** 9 ** 9 ** 9 }}"),
    "doubled": _text("{% set ns = namespace(x='x') %}" + "{% set ns.x = ns.x + ns.x %}" * 40),
    "calls itself": _text("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    "includes": _text("{% include '/etc/passwd' %}"),
    "deep": _text("{{ " + "(" * 100_000 + " }}"),
    "deep loops": _text("{% if 1 %}" * 5000 + "{% endif %}" * 5000),
    "a filter": _text("{{ ('%' ~ '9' * 9 ~ 'd') | format(1) }}"),
    "refuses": _text("{{ raise_exception('no' * 1000000) }}"),
    "an escape": _text("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "says nothing": _text("hello"),
    "a long template": _text("{{ '" + "x" * 20_000_000 + "' }}"),
}
"""Content of `chat_template.jinja`."""


def _changed(**fields: object) -> Callable[[dict[str, object]], object]:
    return lambda content: {**content, **fields}


def _model_changed(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: {**content, "model": {**content["model"], **fields}}


TOKENIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no model": lambda content: {key: content[key] for key in content if key != "model"},
    "another model": _model_changed(type="X" * 100_000),
    "ids beyond": _model_changed(vocab={"a": 2**40}),
    "negative ids": _model_changed(vocab={"a": -1}),
    "merges": _model_changed(merges=[["a", "nothing there"]]),
    "a pattern": _changed(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(((((a+)+)+)+)+$"},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
    "a bomb": _changed(
        normalizer={"type": "Replace", "pattern": {"Regex": "(h*)*(i*)*$^"}, "content": "x" * 10**6}
    ),
    "added tokens": _changed(added_tokens=[{"id": "x", "content": 7}]),
    "many added tokens": _changed(
        added_tokens=[
            {
                "id": 300 + number,
                "content": f"<{number}>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number in range(50_000)
        ]
    ),
}
"""What replaces `tokenizer.json`'s content."""

TOKENIZER_CONFIGS: dict[str, object] = {
    "code": {"tokenizer_class": None, "auto_map": {"AutoTokenizer": ["x.X", None]}},
    "another class": {"tokenizer_class": "X" * 100_000},
    "a number for a class": {"tokenizer_class": 7},
    "a number for a token": {"eos_token": 7},
    "a token that is not there": {"eos_token": {"content": 7}},
    "a template": {"chat_template": 7},
    "templates": {"chat_template": [{"name": 1}]},
    "added tokens": {"added_tokens_decoder": {"x": "y"}},
}
"""What replaces keys of `tokenizer_config.json`."""

JUDGES: dict[str, str] = {
    "no name": "nobody",
    "a setting": "exact,nothing=1",
    "no expression": "regex,pattern=(",
    "no group": "regex,pattern=a",
    "a number": "regex,pattern=7",
    "a long expression": f"regex,pattern=({'a' * 5000})",
    "deep": "regex,pattern=" + "[" * 100_000,
    "no server": "llm,url=ftp://nowhere,model=m",
    "a server's number": "llm,url=7,model=m",
    "tokens": "llm,url=http://127.0.0.1:9,model=m,max_tokens=-1",
    "a line break": "llm,url=http://127.0.0.1:9,model=m,api_key=a\r\nb",
    "no text": "llm,url=http://127.0.0.1:9,model=" + "m" * 1_000_000 + ",rate=x",
}
"""What `--judge` is given, and an evaluation's `judge`."""

EVALUATIONS: dict[str, dict[str, object]] = {
    "no models": {"models": []},
    "a number for a model": {"models": [7]},
    "a model twice": {"models": ["a/b", "c/b"]},
    "no policies": {"policies": None},
    "a policy": {"policies": [{"window": 2**31}]},
    "a policy of many layers": {
        "policies": [{"window": 4, "full_attention_layers": list(range(50_000))}]
    },
    "many policies": {"policies": [{"window": 2 + number} for number in range(2000)] + ["nobody"]},
    "no tasks": {"tasks": 7},
    "a task": {"tasks": [{"task": "nothing"}]},
    "a task's setting": {"tasks": [{"task": "qa", "files": 7}]},
    "a task's file": {"tasks": [{"task": "qa", "files": "x" * 100_000}]},
    "a judge": {"tasks": [{"task": "niah_single", "judge": {"name": "regex", "pattern": "("}}]},
    "attempts": {"attempts": 10**400},
    "a temperature": {"temperature": float("inf")},
    "a batch": {"batch_size": -1},
    "modes": {"thinking": "maybe"},
    "a directory": {"output_dir": 7},
    "a line break": {"output_dir": "a\x00b"},
}
"""What replaces keys of an evaluation's config."""

TRAININGS: dict[str, dict[str, object]] = {
    "no model": {"model": None},
    "files": {"data": 7},
    "no files": {"data": {"files": [], "seq_len": 64, "batch_size": 1}},
    "a file's name": {"data": {"files": "x" * 100_000, "seq_len": 64, "batch_size": 1}},
    "a length": {"data": {"files": "x", "seq_len": 2**70, "batch_size": 1}},
    "a rank": {"lora": {"rank": 2**70}},
    "modules": {"lora": {"rank": 2, "target_modules": ["("]}},
    "a schedule": {"optimizer": {"schedule": "x" * 100_000}},
    "a rate": {"optimizer": {"learning_rate": "fast"}},
    "an infinite rate": {"optimizer": {"learning_rate": float("inf")}},
    "a loss": {"loss": {"name": 7}},
    "a mesh": {"mesh": {"fsdp": 2**40}},
    "a dtype": {"dtype": "float7"},
    "steps": {"max_steps": 0},
    "a policy": {"policy": {"window": -1}},
    "a directory": {"output_dir": 7},
    "a null byte": {"output_dir": "a\x00b"},
}
"""What replaces keys of a training's config."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "a column": ("--data-set", "columns={response: nothing}"),
    "columns": ("--data-set", "columns=7"),
    "an unknown field": ("--data-set", "nothing=1"),
    "no equals": ("--data-set", "chat_template"),
    "deep": ("--data-set", "columns=" + "[" * 10_000),
    "an option": ("--set", "nothing=1"),
    "an option's value": ("--set", "steps=[1"),
    "a window": ("--window", "4294967296"),
    "samples": ("--samples", "-1"),
    "a length": ("--max-length", "0"),
}
"""Flags of `swaa select`, which has no config of its own."""


def _parquet(columns: Callable[[], dict[str, Any]]) -> Make:
    def make(path: pathlib.Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns()), path)

    return make


def _no_unicode() -> dict[str, Any]:
    import pyarrow

    raw = pyarrow.array([b"\xff\xfe"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, raw.buffers())
    return {"prompt": text, "answer": ["a"]}


def _damaged(make: Make, change: Callable[[bytes], bytes]) -> Make:
    def damaged(path: pathlib.Path) -> None:
        make(path)
        path.write_bytes(change(path.read_bytes()))

    return damaged


def _nested(levels: int) -> list[object]:
    value: list[object] = ["a"]
    for _ in range(levels):
        value = [value]
    return value


_SOUND = _parquet(lambda: {"prompt": ["Q" * 1000] * 100, "answer": ["A"] * 100})

TABLES: dict[str, Make] = {
    "empty": _text(""),
    "zeros": _text(b"\x00" * 1000),
    "jsonl": _text('{"prompt": "a", "answer": "b"}\n'),
    "no records": _parquet(lambda: {"prompt": [], "answer": []}),
    "no columns": _parquet(dict),
    "half": _damaged(_SOUND, lambda data: data[: len(data) // 2]),
    "no end": _damaged(_SOUND, lambda data: data[:-4]),
    "a long footer": _damaged(_SOUND, lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1"),
    "pages": _damaged(_SOUND, lambda data: data[:4] + b"\xff" * 200 + data[204:]),
    "a footer": _damaged(_SOUND, lambda data: data[:-300] + b"\xff" * 200 + data[-100:]),
    "no Unicode": _parquet(_no_unicode),
    "numbers": _parquet(lambda: {"prompt": [1], "answer": [2.5]}),
    "nulls": _parquet(lambda: {"prompt": [None], "answer": [None]}),
    "deep": _parquet(lambda: {"prompt": ["a"], "answer": ["b"], "x": [_nested(70)]}),
    "messages": _parquet(lambda: {"messages": [[{"role": None, "content": "a"}]], "answer": ["b"]}),
    "columns": _parquet(lambda: {f"column{number}": ["a"] for number in range(5000)}),
    "a long name": _parquet(lambda: {"k" * 1_000_000: ["a"]}),
    "a repeated text": _parquet(lambda: {"x": ["y" * 1_000_000] * 1500}),
    "bytes": _parquet(lambda: {"prompt": [b"\xff"], "answer": [b"\x00"]}),
}
"""Data in parquet."""

LISTS: dict[str, Make] = {
    "no list": _text('{"prompt": "a"'),
    "unclosed": _text('[{"prompt": "a"}'),
    "deep": _text("[" * 100_000),
    "deep in a record": _text('[{"prompt": ' + "[" * 400 + "]" * 400 + "}]"),
    "no objects": _text("[1, 2]"),
    "no records": _text("[]"),
    "half": _text('[{"prompt": "\\ud800", "answer": "a"}]'),
    "a long number": _text('[{"prompt": "a", "answer": ' + "9" * 100_000 + "}]"),
    "no Unicode": _text(b'[{"prompt": "\xff", "answer": "a"}]'),
}
"""Data in a JSON list."""
