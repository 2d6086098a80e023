"""Which policies a server may run in place of the one that it should run, each by a name."""

import dataclasses
from collections.abc import Iterator, Sequence

from swaa_jax.fields import wrong
from swaa_jax.policy import AttentionPolicy, LayerAttention

__all__ = ["RECORDED", "Candidate", "candidates"]

RECORDED = "the recorded policy"
"""The name of the policy that a server should run.

>>> candidates(AttentionPolicy(window=64), num_layers=4)[0].name == RECORDED
True
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A policy by name.

    Attributes:
        name: says in what it differs, as in `window - 1`.
        policy: all of it.

    Examples:
        >>> found = candidates(AttentionPolicy(window=64), num_layers=4)
        >>> [(one.name, str(one.policy)) for one in found[1:3]]
        [('full attention', 'full'), ('window - 1', 'window=63')]
    """

    name: str
    policy: AttentionPolicy


def candidates(
    policy: AttentionPolicy,
    *,
    num_layers: int,
    num_kv_heads: int | None = None,
    against: Sequence[AttentionPolicy] = (),
) -> list[Candidate]:
    """The policy, and what servers run by mistake in its place; the policy is the first.

    Policies that come to the same on this model are one, under the first name.

    Args:
        policy: that a server should run.
        num_layers, num_kv_heads: of the model.
        against: further policies, named by their text.

    Raises:
        ValueError: the policy or one of `against` does not fit the model, or there is nothing to
            tell the policy from.

    Examples:
        >>> policy = AttentionPolicy.parse("window=64,sinks=4,full_layers=1::2,decode=full")
        >>> [one.name for one in candidates(policy, num_layers=4)][:6]
        ['the recorded policy', 'full attention', 'window - 1', 'window + 1', 'no sinks',
         'sinks - 1']
    """

    def resolved(one: AttentionPolicy) -> tuple[LayerAttention, ...]:
        return one.resolve(num_layers, num_kv_heads=num_kv_heads)

    found = {resolved(policy): Candidate(name=RECORDED, policy=policy)}
    for one in against:
        found.setdefault(resolved(one), Candidate(name=str(one), policy=one))
    for name, fields in _changes(policy, num_layers):
        try:
            other = AttentionPolicy() if not fields else dataclasses.replace(policy, **fields)
            found.setdefault(resolved(other), Candidate(name=name, policy=other))
        except ValueError:  # no such policy for this model
            continue
    if len(found) == 1:
        raise wrong(
            "policy",
            "one that differs from full attention, or others to tell it from",
            str(policy),
            "name some in against",
        )
    # What was asked for by hand stands behind the usual mistakes.
    named = {str(one) for one in against}
    return sorted(found.values(), key=lambda one: one.name in named)


def _changes(policy: AttentionPolicy, num_layers: int) -> Iterator[tuple[str, dict[str, object]]]:
    """Mistakes by name: fields that are changed; none for full attention."""
    if policy.window is None:
        return
    yield "full attention", {}
    yield "window - 1", {"window": policy.window - 1}
    yield "window + 1", {"window": policy.window + 1}
    sinks = policy.num_sink_tokens
    if sinks:
        yield "no sinks", {"num_sink_tokens": 0}
        yield "sinks - 1", {"num_sink_tokens": sinks - 1}
        yield "sinks + 1", {"num_sink_tokens": sinks + 1}
    else:
        yield "4 sinks", {"num_sink_tokens": 4}
    yield from _other_layers(policy, num_layers)
    if policy.decode != "window":
        yield "window-only decode", {"decode": "window"}
    if policy.decode != "full":
        yield "FA decode", {"decode": "full"}
    if policy.full_attention_heads:
        yield "no full heads", {"full_attention_heads": ()}
    if policy.full_attention_tail:
        yield "no tail", {"full_attention_tail": 0}


def _other_layers(
    policy: AttentionPolicy, num_layers: int
) -> Iterator[tuple[str, dict[str, object]]]:
    layers = policy.resolve(num_layers)
    full = {at for at, layer in enumerate(layers) if layer.is_full}
    if not full:
        return
    yield "all layers windowed", {"full_attention_layers": ()}
    rest = set(range(num_layers)) - full
    down, up = ({(at + by) % num_layers for at in full} for by in (-1, 1))
    if abs(len(rest) - len(full)) <= 1:
        yield _layers_named(rest, num_layers)
    yield _layers_named(down, num_layers)
    yield _layers_named(up, num_layers)


def _layers_named(layers: set[int], num_layers: int) -> tuple[str, dict[str, object]]:
    """A slice where one says it, as `0::2`."""
    every = [(start, step) for step in range(2, 9) for start in range(step)]
    slices = (f"{a}::{step}" for a, step in every if set(range(a, num_layers, step)) == layers)
    text = next(slices, None)
    value = tuple(sorted(layers)) if text is None else text
    shown = "+".join(map(str, sorted(layers))) if text is None else text
    shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
    return f"full layers {shown}", {"full_attention_layers": value}
