"""Layers and KV heads: how they are written, and which ones of a model they are.

Layers are ints from 0 (negative ones count from the last layer) or a slice in a string, ``"1::2"``.
Both stay as they are until the model's depth is known.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from swaa_jax.fields import integer, nearest, plural, show, wrong

__all__ = ["HeadSelection", "LayerSelection"]

LayerSelection: TypeAlias = Sequence[int] | str
"""Layers, from 0: ints such as ``(1, 3, 5)``, or a slice of the layers in a string, ``"1::2"``.

>>> sorted(resolve_layers("layers", "1::2", 6)), sorted(resolve_layers("layers", (0, -1), 6))
([1, 3, 5], [0, 5])
"""

HeadSelection: TypeAlias = Mapping[Any, Sequence[int]] | Sequence[tuple[int, Sequence[int]]]
"""KV heads of some layers: ``{3: [0, 2], 5: [1]}``, or the pairs of that mapping.

>>> head_selection("heads", {5: [1], 3: [2, 0]})  # as a policy keeps it
((3, (0, 2)), (5, (1,)))
"""

HeadPairs: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]
"""The same in its one form: sorted pairs of a layer and its heads."""

_SLICE = re.compile(r"\s*([+-]?\d+)?\s*:\s*([+-]?\d+)?\s*(?::\s*([+-]?\d+)?\s*)?")
_LAYERS = 'a list of layers or a slice in a string such as "1::2"'
_WHOLE, _FROM_ZERO = integer(), integer(least=0)
_HEADS = "layers and their lists of KV heads, as in {3: [0, 2], 5: [1]}"


# One form of what is written.


def decode_layers(name: str, value: object) -> LayerSelection:
    """``"window"``, ``"full"`` or a selection of layers; no layers are ``"window"``."""
    if isinstance(value, str) and value in ("window", "full"):
        return value
    expected = "window, full or a selection of layers"
    if isinstance(value, bool):
        raise wrong(name, expected, value, f"write {'full' if value else 'window'}")
    if isinstance(value, str) and ":" not in value:
        raise ValueError(f"{wrong(name, expected, value)}{nearest(value, ['window', 'full'])}")
    return layer_selection(name, value) or "window"


def layer_selection(name: str, value: object) -> str | tuple[int, ...]:
    """Distinct ints in canonical order, or a slice in canonical form."""
    if isinstance(value, str):
        return _canonical_slice(name, value)
    if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes):
        advice = ""
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            advice = f'write "{":".join("" if part is None else show(part) for part in parts)}"'
        if isinstance(value, int) and not isinstance(value, bool):
            advice = (
                f"for that one layer write [{value}]; if it was a slice in YAML, quote it: a bare "
                '1:36 is the number 96 there, "1:36" is the slice'
            )
        raise wrong(name, _LAYERS, value, advice)
    layers = []
    for item in value:
        if isinstance(item, str):
            raise wrong(name, "integers", item, "a slice stands alone, not in a list")
        layers.append(_WHOLE(f"{name}: a layer", item))
    if repeated := _repeated(layers):
        raise ValueError(
            f"{name}: expected each layer once, got {format_layers(repeated)} more than once"
        )
    return tuple(sorted(layers, key=_first_to_last))


def distinct_heads(name: str, value: object) -> tuple[int, ...]:
    """Distinct KV heads, from 0, sorted."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        advice = f"for that one head write [{value}]" if isinstance(value, int) else ""
        raise wrong(name, "a list of KV heads", value, advice)
    heads = [_FROM_ZERO(f"{name}: a KV head", head) for head in value]
    if repeated := _repeated(heads):
        raise ValueError(
            f"{name}: expected each KV head once, got {format_layers(repeated)} more than once"
        )
    return tuple(sorted(heads))


def head_selection(name: str, value: object) -> HeadPairs:
    """Pairs of a layer and its heads, in canonical order; layers without heads are left out."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise wrong(name, _HEADS, value)
    pairs = list(value.items() if isinstance(value, Mapping) else value)
    if not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
        raise wrong(name, _HEADS, value)
    found: dict[int, tuple[int, ...]] = {}
    for key, heads in pairs:
        # JSON has no other keys than strings.
        is_text = isinstance(key, str) and re.fullmatch(r"[+-]?\d{1,9}", key)
        layer = _WHOLE(f"{name}: a layer", int(key) if is_text else key)
        if layer in found:
            raise ValueError(f"{name}: expected each layer once, got {layer} more than once")
        found[layer] = distinct_heads(f"{name}, layer {layer}", heads)
    layers = sorted(found, key=_first_to_last)
    return tuple((layer, found[layer]) for layer in layers if found[layer])


def check_idle_heads(name: str, layers: Iterable[int], full_layers: Iterable[Any]) -> None:
    """A layer with full heads that is full anyway is a mistake; a slice names no layers yet."""
    idle = sorted(set(layers) & set(full_layers))
    if idle:
        raise ValueError(
            f"{name}: expected layers that are not full, got {plural('layer', len(idle))} "
            f"{format_layers(idle)}, which full_attention_layers has too; leave "
            f"{'it' if len(idle) == 1 else 'them'} out of one of the two"
        )


def format_layers(layers: LayerSelection) -> str:
    """A slice as it is, ints with commas: ``"1,3,5"``; of many the first twenty."""
    if isinstance(layers, str):
        return layers
    shown = ",".join(map(str, layers[:20]))
    return shown if len(layers) <= 20 else f"{shown},... ({len(layers)} in all)"


def _canonical_slice(name: str, text: str) -> str:
    """One spelling a slice: ``" +1 : : 2"`` gives ``"1::2"``, ``"0:4:1"`` gives ``"0:4"``."""
    match = _SLICE.fullmatch(text) if len(text) <= 60 else None
    if match is None:
        raise wrong(name, _LAYERS, text)
    start, stop, step = (None if part is None else int(part) for part in match.groups())
    if step is not None and step < 1:
        raise wrong(name, "a slice with a positive step", text)
    head = f"{'' if start is None else start}:{'' if stop is None else stop}"
    return head if step in (None, 1) else f"{head}:{step}"


def _repeated(numbers: Sequence[int]) -> list[int]:
    seen: set[int] = set()
    return sorted({number for number in numbers if number in seen or seen.add(number)})


def _first_to_last(layer: int) -> tuple[bool, int]:
    return layer < 0, layer


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
    there = f"layers of the model, which has {num_layers}, 0 to {num_layers - 1}"
    if isinstance(layers, str):
        parts = [int(part) if part else None for part in layers.split(":")]
        for part in parts[:2]:
            if part is not None and not -num_layers <= part <= num_layers:
                raise ValueError(f'{name}: expected {there}, got "{layers}", out of range')
        selected = frozenset(range(num_layers)[slice(*parts)])
        if not selected:
            raise ValueError(f'{name}: expected {there}, got "{layers}", which selects none')
        return selected
    outside = [layer for layer in layers if not -num_layers <= layer < num_layers]
    if outside:
        raise ValueError(
            f"{name}: expected {there}, got {plural('layer', len(outside))} "
            f"{format_layers(outside)}, out of range"
        )
    selected = [layer % num_layers for layer in layers]
    if repeated := _repeated(selected):
        raise ValueError(
            f"{name}: expected each layer once, got {format_layers(repeated)} twice in "
            f"{format_layers(layers)}; the model has {num_layers} layers"
        )
    return frozenset(selected)


def resolve_heads(
    name: str,
    selection: HeadPairs,
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
                f"{name}, layer {layer}: expected KV heads of the model, which has "
                f"{num_kv_heads}, 0 to {num_kv_heads - 1}, got {format_layers(outside)}, out of "
                "range"
            )
    return heads_of
