"""What `swaa_jax.policy` needs to read its fields: checks, layer selections, strict YAML, words."""

import difflib
import operator
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import yaml

LayerSelection: TypeAlias = Sequence[int] | str
"""Layers, from 0: ints such as ``(1, 3, 5)``, or a slice of the layers in a string, ``"1::2"``."""

HeadSelection: TypeAlias = Mapping[Any, Sequence[int]] | Sequence[tuple[int, Sequence[int]]]
"""KV heads of some layers: ``{3: [0, 2], 5: [1]}``, or the pairs of that mapping."""

SWAA_CONFIG_KEYS = ("sliding_window_size", "keep_first", "force_fa_decode", "non_sliding_layers")

_SLICE = re.compile(r"\s*([+-]?\d+)?\s*:\s*([+-]?\d+)?\s*(?::\s*([+-]?\d+)?\s*)?")


# Validation of values.


def field_setter(instance: object):
    """Sets fields of a frozen dataclass, in its `__post_init__` only."""
    return lambda name, value: object.__setattr__(instance, name, value)


def _as_int(value: Any) -> int | None:
    """Python's and numpy's integers as an int; None for bools, floats, strings and the rest."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer(name: str, value: Any, *, minimum: int) -> int:
    """An int that is at least `minimum`, or a ValueError that names the field."""
    number = _as_int(value)
    if number is not None and number >= minimum:
        return number
    raise ValueError(f"{name} must be an integer, at least {minimum}; got {describe(value)}.")


def integer_or_none(name: str, value: Any, *, minimum: int) -> int | None:
    """The same, or None."""
    if value is None:
        return None
    try:
        return integer(name, value, minimum=minimum)
    except ValueError as error:
        raise ValueError(f"{str(error)[:-1]}. None means full attention.") from None


def decode_field(value: Any) -> str | tuple[int, ...]:
    """``"window"``, ``"full"`` or a selection of layers; no layers are ``"window"``."""
    if isinstance(value, str) and value in ("window", "full"):
        return value
    if isinstance(value, bool):
        raise ValueError(
            f'decode must be "window", "full" or a selection of layers; got {value}. '
            f'Write decode="{"full" if value else "window"}".'
        )
    if isinstance(value, str) and ":" not in value:
        near = difflib.get_close_matches(value, ["window", "full"], n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ValueError(
            f'decode must be "window", "full" or a selection of layers; got "{value}".{hint}'
        )
    return layer_selection("decode", value) or "window"


def layer_selection(name: str, value: Any) -> str | tuple[int, ...]:
    """Distinct ints in canonical order, or a slice in canonical form."""
    if isinstance(value, str):
        return canonical_slice(name, value)
    if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes):
        hint = ""
        if isinstance(value, int) and not isinstance(value, bool):
            hint = (
                f" For that one layer write [{value}]. If it was a slice in YAML, quote it:"
                ' a bare 1:36 is the number 96 there, "1:36" is the slice.'
            )
        raise ValueError(
            f'{name} must be a list of layers or a slice in a string such as "1::2"; '
            f"got {describe(value)}.{hint}"
        )
    layers = []
    for item in value:
        number = _as_int(item)
        if number is None:
            hint = " A slice stands alone, not in a list." if isinstance(item, str) else ""
            raise ValueError(
                f"{name} must hold integers; got {describe(item)} among its items.{hint}"
            )
        layers.append(number)
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise ValueError(f"{name} names layers more than once: {format_layers(repeated)}.")
    return tuple(sorted(layers, key=lambda layer: (layer < 0, layer)))


def head_set(name: str, value: Any) -> tuple[int, ...]:
    """Distinct KV heads, from 0, sorted."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        hint = f" For that one head write [{value}]." if _as_int(value) is not None else ""
        raise ValueError(f"{name} must be a list of KV heads; got {describe(value)}.{hint}")
    heads = [integer(f"{name}: a KV head", head, minimum=0) for head in value]
    repeated = sorted({head for head in heads if heads.count(head) > 1})
    if repeated:
        raise ValueError(f"{name} names KV heads more than once: {format_layers(repeated)}.")
    return tuple(sorted(heads))


def head_selection(name: str, value: Any) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Pairs of a layer and its heads, in canonical order; layers without heads are left out."""
    message = f"{name} must map layers to lists of KV heads, as in {{3: [0, 2], 5: [1]}}; got "
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise ValueError(f"{message}{describe(value)}.")
    pairs = list(value.items() if isinstance(value, Mapping) else value)
    if not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{message}{describe(value)}.")
    found: dict[int, tuple[int, ...]] = {}
    for key, heads in pairs:
        # JSON has no other keys than strings.
        is_text = isinstance(key, str) and re.fullmatch(r"[+-]?\d+", key)
        layer = int(key) if is_text else _as_int(key)
        if layer is None:
            raise ValueError(f"{message}{describe(key)} in the place of a layer.")
        if layer in found:
            raise ValueError(f"{name} names layers more than once: {layer}.")
        found[layer] = head_set(f"{name}, layer {layer}", heads)
    layers = sorted(found, key=lambda layer: (layer < 0, layer))
    return tuple((layer, found[layer]) for layer in layers if found[layer])


def check_idle_heads(name: str, layers: Iterable[int], full_layers: Iterable[Any]) -> None:
    """A layer with full heads that is full anyway is a mistake; a slice names no layers yet."""
    idle = sorted(set(layers) & set(full_layers))
    if idle:
        raise ValueError(
            f"{name} names {plural('layer', len(idle))} {format_layers(idle)}, where it would have "
            "no effect beside full_attention_layers. Leave them out of one of the two."
        )


def canonical_slice(name: str, text: str) -> str:
    """One spelling a slice: ``" +1 : : 2"`` gives ``"1::2"``, ``"0:4:1"`` gives ``"0:4"``."""
    match = _SLICE.fullmatch(text)
    if match is None:
        raise ValueError(
            f'{name} must be a list of layers or a slice in a string such as "1::2"; got "{text}".'
        )
    start, stop, step = (None if part is None else int(part) for part in match.groups())
    if step is not None and step < 1:
        raise ValueError(f'{name}: the step of a slice must be positive; got "{text}".')
    head = f"{'' if start is None else start}:{'' if stop is None else stop}"
    return head if step in (None, 1) else f"{head}:{step}"


# Layers of a model with known depth.


def resolve_decode(decode: LayerSelection, num_layers: int) -> frozenset[int]:
    """The layers whose answer tokens see everything."""
    if decode == "window":
        return frozenset()
    if decode == "full":
        return frozenset(range(num_layers))
    return resolve_layers("decode", decode, num_layers)


def resolve_layers(name: str, layers: LayerSelection, num_layers: int) -> frozenset[int]:
    """The layers, from 0, that a selection means in a model with `num_layers` layers."""
    depth = f"the model has {num_layers} layers, 0 to {num_layers - 1}"
    if isinstance(layers, str):
        parts = [int(part) if part else None for part in layers.split(":")]
        for part in parts[:2]:
            if part is not None and not -num_layers <= part <= num_layers:
                raise ValueError(f'{name}="{layers}" reaches out of range: {depth}.')
        selected = frozenset(range(num_layers)[slice(*parts)])
        if not selected:
            raise ValueError(f'{name}="{layers}" selects no layer: {depth}.')
        return selected
    outside = [layer for layer in layers if not -num_layers <= layer < num_layers]
    if outside:
        raise ValueError(
            f"{name}: {plural('layer', len(outside))} {format_layers(outside)} "
            f"{'is' if len(outside) == 1 else 'are'} out of range: {depth}."
        )
    selected = [layer % num_layers for layer in layers]
    repeated = sorted({layer for layer in selected if selected.count(layer) > 1})
    if repeated:
        raise ValueError(
            f"{name}={format_layers(layers)} names layers {format_layers(repeated)} twice: {depth}."
        )
    return frozenset(selected)


def resolve_heads(
    name: str,
    selection: Any,
    num_layers: int,
    *,
    num_kv_heads: int | None,
    full_layers: frozenset[int],
) -> list[tuple[int, ...]]:
    """The full heads of each layer of a model, most of them none."""
    layers = [layer for layer, _ in selection]
    check_idle_heads(name, resolve_layers(name, layers, num_layers), full_layers)
    heads_of: list[tuple[int, ...]] = [()] * num_layers
    for layer, heads in selection:
        heads_of[layer] = heads
        outside = [head for head in heads if num_kv_heads is not None and head >= num_kv_heads]
        if num_kv_heads is not None and outside:
            raise ValueError(
                f"{name}, layer {layer}: KV {plural('head', len(outside))} "
                f"{format_layers(outside)} {'is' if len(outside) == 1 else 'are'} out of range: "
                f"the model has {num_kv_heads} KV {plural('head', num_kv_heads)}, 0 to "
                f"{num_kv_heads - 1}."
            )
    return heads_of


# The reference's configuration.


def swaa_layers(name: str, value: Any) -> tuple[int, ...]:
    """An explicit list of layers; the reference has no slices, and no layers from the end."""
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list of layers; got {describe(value)}.")
    layers = layer_selection(name, value)
    if any(not isinstance(layer, int) or layer < 0 for layer in layers):
        raise ValueError(f"{name} must hold layers from 0 up; got {list(value)!r}.")
    return tuple(int(layer) for layer in layers)


def swaa_fields(config: Mapping[str, Any], *, num_layers: int | None) -> dict[str, Any]:
    """The fields of a policy with a window, from the reference's settings.

    Layers that a model with `num_layers` layers does not have are dropped with one warning.
    """
    full_layers = swaa_layers("non_sliding_layers", config.get("non_sliding_layers"))
    decode = config.get("force_fa_decode")
    if decode is None or isinstance(decode, bool):
        decode = "full" if decode else "window"
    else:
        decode = swaa_layers("force_fa_decode", decode)
    if num_layers is not None:
        dropped = {layer for layer in full_layers if layer >= num_layers}
        full_layers = tuple(layer for layer in full_layers if layer not in dropped)
        if isinstance(decode, tuple):
            dropped.update(layer for layer in decode if layer >= num_layers)
            decode = tuple(layer for layer in decode if layer < num_layers)
        if dropped:
            warnings.warn(
                f"SWAA config: dropped layers {format_layers(sorted(dropped))}, which a model "
                f"with {num_layers} layers does not have.",
                stacklevel=3,
            )
    return {
        "window": integer("sliding_window_size", config["sliding_window_size"], minimum=1),
        "num_sink_tokens": integer("keep_first", config.get("keep_first") or 0, minimum=0),
        "full_attention_layers": full_layers,
        "decode": decode,
    }


def one_setting(document: Any) -> Mapping[str, Any]:
    """The reference keeps its settings in lists; a policy is one of them."""
    if isinstance(document, Mapping):
        return document
    if isinstance(document, Sequence) and not isinstance(document, str):
        if len(document) == 1:
            return one_setting(document[0])
        raise ValueError(
            f"a list of {len(document)} settings, and a policy is one of them: "
            "pass the entry that you want, AttentionPolicy.from_swaa_config(settings[i])."
        )
    raise ValueError(f"a SWAA config is a mapping; got {describe(document)}.")


# Files.


def check_keys(fields: Mapping[str, Any], known: Sequence[str], *, what: str) -> None:
    """Names every unknown key, the nearest known one, and the known ones."""
    unknown = [key for key in fields if key not in known]
    if not unknown:
        return
    hints = []
    for key in unknown:
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        hints.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    advice = ""
    if what == "attention policy":
        if {"swaa_config", *SWAA_CONFIG_KEYS} & set(unknown):
            advice = " This is the reference's format: read it with from_swaa_config."
        elif "policy" in unknown:
            advice = " Pass only what is under 'policy'."
    raise ValueError(
        f"Unknown {plural('key', len(unknown))} in the {what}: {', '.join(hints)}. "
        f"Known keys: {', '.join(known)}.{advice}"
    )


class _StrictLoader(yaml.SafeLoader):
    """YAML without base sixty and without repeated keys."""

    def construct_yaml_number(self, node):
        """An int or a float, unless it is written with colons."""
        if ":" in node.value:
            raise ValueError(
                f"line {node.start_mark.line + 1}: {node.value} without quotes is a number in base "
                f'sixty in YAML 1.1. Quote a slice of layers: "{node.value}".'
            )
        if node.tag.endswith(":int"):
            return super().construct_yaml_int(node)
        return super().construct_yaml_float(node)

    def construct_mapping(self, node, deep=False):
        """A dict, unless a key is repeated (plain YAML keeps the last one in silence)."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = node.value[index][0].start_mark.line + 1
                raise ValueError(f"line {line}: the key {key!r} is there twice.")
        return super().construct_mapping(node, deep=deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_number)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_number)


def parse_yaml(text: str) -> Any:
    """The document in `text`; all that is wrong with it is a ValueError."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"Not valid YAML: {error}") from error


# Words.


def plural(noun: str, count: int) -> str:
    """The noun with an s unless there is one."""
    return noun if count == 1 else f"{noun}s"


def format_layers(layers: LayerSelection) -> str:
    """A slice as it is, ints with commas: ``"1,3,5"``."""
    return layers if isinstance(layers, str) else ",".join(map(str, layers))


def format_heads(selection: Any) -> str:
    """Heads after their layer, ``"3:0+2,5:1"``; of many layers only how many heads there are."""
    if len(selection) > 4:
        count = sum(len(heads) for _, heads in selection)
        return f"{count} in {len(selection)} layers"
    return ",".join(f"{layer}:{'+'.join(map(str, heads))}" for layer, heads in selection)


def describe(value: Any) -> str:
    """A value and its type, for messages."""
    return f"{value!r} ({type(value).__name__})"
