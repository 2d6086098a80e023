"""`select_layers`: which layers keep full attention, from a model, a tokenizer and data."""

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from swaa_jax.arguments import check_keywords, told_keywords
from swaa_jax.data import Sample
from swaa_jax.fields import flag, integer, or_none, path, wrong
from swaa_jax.models import CausalLM
from swaa_jax.models.loaded import ModelLike, loaded_model, loaded_tokenizer
from swaa_jax.policy import PolicyLike, load_policy
from swaa_jax.progress import ProgressLike
from swaa_jax.runs import check_writable
from swaa_jax.selection.calibration import read_calibration
from swaa_jax.selection.select import METHODS, check_options, option_names, select_from_samples
from swaa_jax.selection.selection import Selection
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["count_of_share", "select_layers"]


@told_keywords()
def select_layers(
    model: ModelLike,
    tok: "PreTrainedTokenizerBase | PathLike | None" = None,
    data: object = None,
    *,
    policy: PolicyLike,
    share: float | str | Fraction | None = None,
    num_full_layers: int | None = None,
    method: str = "add_one",
    directory: PathLike | None = None,
    limit: int | None = 64,
    max_length: int = 32768,
    enable_thinking: bool | None = None,
    data_config: Mapping[str, object] | None = None,
    rows_at_once: int | None = None,
    identity: Mapping[str, object] | None = None,
    progress: ProgressLike = None,
    **options: object,
) -> Selection:
    """Choose the layers, or KV heads, that keep full attention, from how a model answers.

    Args:
        model: from `load_model`, or what it loads by; its own policy does not matter.
        tok: its tokenizer; None: that of the model's files.
        data: prompts with answers: a list of dicts, a `datasets.Dataset`, a pandas frame or files,
            with the columns that `swaa train` reads (`prompt` and `response` or `answer`, or
            `messages`); or `Sample`s, which need no tokenizer. Prompts must be longer than the
            window.
        policy: what the other layers get, by name, as text, dict or object: window, sinks and
            decoding; no full layers.
        share: of the layers that are to be full: ``1/4``, ``"1/4"``; rounded to a number.
        num_full_layers: the number itself, in place of `share`; with the gates' `per_head`, as many
            KV heads as they have.
        method: one of `METHODS`: "add_one", "remove_one", "greedy", "backward", "pairwise",
            "gates", "lazy_ratio" or "periodic". docs/select-layers.md says which one when.
        directory: keeps what was evaluated. The same call again goes on there, and other methods
            read it too.
        limit: the first so many samples; None: all.
        max_length: tokens of prompt and answer; longer samples are left out.
        enable_thinking: for the chat template, as it will be at inference; None: its own default.
        data_config: further fields of `DataConfig`: columns, chat_template, answers ("verbatim"
            here, which suits a model's own answers), ...
        rows_at_once: samples times candidates that run at once; None: what fits into memory by a
            rough count.
        identity: what else makes the model what it is, for the directory; see
            `select_from_samples`.
        progress: who is told how far it is; see `swaa_jax.progress`.
        options: of the method: `offset` (periodic), `max_evaluations` (greedy, backward,
            pairwise), `start` and `least_gain` (pairwise), and the fields of `LazyRatioConfig` and
            `GatesConfig`.

    Returns:
        The selection; `selection.policy` is ready for `model.with_policy`.

    Raises:
        ValueError: something that is not as above, an unknown option, a number of layers that
            leaves nothing to select, samples on which layers cannot be compared, or a directory of
            another run.
        DeviceMemoryError: a device has no room for it; the message says how many tokens would fit.

    Examples:
        >>> import swaa_jax as swaa
        >>> found = swaa.select_layers(  # doctest: +SKIP
        ...     "Qwen/Qwen3-4B", data="questions.jsonl", policy="window=2048,sinks=10,decode=full",
        ...     share=1/4,
        ... )
        >>> model = swaa.load_model("Qwen/Qwen3-4B", policy=found.policy)  # doctest: +SKIP

    References:
        "add_one" is arXiv 2606.27791; "periodic" is section 3.3 of arXiv 2512.10411.
    """
    checked = _checked_options(method, options)
    chosen_policy = load_policy(policy)
    _check_size(share, num_full_layers)
    or_none(flag)("enable_thinking", enable_thinking)
    integer(least=2)("max_length", max_length)
    or_none(integer(least=1))("rows_at_once", rows_at_once)
    check_writable("directory", or_none(path)("directory", directory))
    if tok is not None and data is None and isinstance(tok, list | tuple):
        raise ValueError(
            "data: expected data behind the tokenizer, got none; the order is model, tok, data, "
            "where tok=None is the model's own tokenizer"
        )
    if not _are_samples(data):
        data = read_calibration(
            data,
            loaded_tokenizer(tok, model),
            limit=limit,
            max_length=max_length,
            progress=progress,
            **_data_fields(data_config, enable_thinking),
        )
    name = _name(model)
    loaded = loaded_model(model)
    samples: Any = data
    return select_from_samples(
        loaded,
        samples,
        method=method,
        num_full_layers=_num_full_layers(share, num_full_layers, loaded.config.num_layers),
        policy=chosen_policy,
        directory=directory,
        identity=identity,
        rows_at_once=rows_at_once,
        progress=progress,
        options=checked,
        name=name,
    )


def count_of_share(name: str, share: object, num_layers: int) -> int:
    """So many layers that they are that part of all.

    >>> count_of_share("share", "1/4", 36), count_of_share("share", 0.5, 8)
    (9, 4)

    Args:
        name: of the argument, for messages.
        share: a number or a text such as ``"1/4"``.
        num_layers: L.

    Raises:
        ValueError: no part, or one that leaves no full layer or no windowed one.
    """
    count = round(_part(name, share) * num_layers)
    if not 0 < count < num_layers:
        expected = f"a part of the {num_layers} layers, as in 1/4 or 0.25, that leaves full and"
        raise wrong(name, f"{expected} windowed ones", share)
    return count


def _part(name: str, share: object) -> Fraction:
    """A part of the layers, of however many there are."""
    given: Any = share
    try:
        part = Fraction(given) if not isinstance(share, bool) else Fraction(0)
    except (ValueError, ZeroDivisionError, TypeError, OverflowError):
        part = Fraction(0)
    if not 0 < part < 1:
        raise wrong(name, "a part of the layers, above 0 and below 1, as in 1/4 or 0.25", share)
    return part


def check_share(share: object) -> None:
    """Refuses what can be no model's part of the layers, before a model is loaded; None is fine."""
    if share is not None:
        _part("share", share)


def _check_size(share: object, num_full_layers: object) -> None:
    or_none(integer(least=1))("num_full_layers", num_full_layers)
    if (share is None) == (num_full_layers is None):
        got = "neither" if share is None else "both"
        raise ValueError(
            f"share: expected it or num_full_layers, got {got}; give share=1/4, for example"
        )
    check_share(share)


def _num_full_layers(share: object, num_full_layers: int | None, num_layers: int) -> int:
    if num_full_layers is not None:
        return num_full_layers
    return count_of_share("share", share, num_layers)


def _checked_options(method: Any, options: Mapping[str, object]) -> dict[str, Any]:
    """The method's options; a word that is none is told with the nearest argument or option."""
    if method not in METHODS:
        return check_options(method, options)
    known = option_names(method)
    for name in options:
        others = [one for one in METHODS if name in option_names(one)]
        if name not in known and others:
            raise ValueError(
                f"{name}: expected an option of {method} ({', '.join(known) or 'it has none'}), "
                f"got one of {', '.join(others)}; leave it out, or give that method"
            )
    aliases = {"output_dir": "directory", "policies": "policy"}
    unknown = [one for one in options if one not in known]
    check_keywords(select_layers, unknown, known, aliases=aliases)
    return check_options(method, options)


def _are_samples(data: object) -> bool:
    if data is None:
        raise ValueError(
            "data: expected prompts with answers (a list of dicts, a datasets.Dataset, a pandas "
            "frame, or a file), got None; the order is model, tok, data"
        )
    given: Any = data
    is_list = isinstance(data, Sequence) and not isinstance(data, str) and len(data) > 0
    return is_list and isinstance(given[0], Sample)


def _data_fields(data_config: object, enable_thinking: bool | None) -> dict[str, Any]:
    if data_config is not None and not isinstance(data_config, Mapping):
        raise wrong("data_config", "a mapping of fields of DataConfig", data_config)
    fields: dict[str, Any] = dict(data_config or {})
    if enable_thinking is not None:
        given = fields.get("chat_template_kwargs", {})
        fields["chat_template_kwargs"] = {**given, "enable_thinking": enable_thinking}
    return fields


def _name(model: object) -> str:
    """What the model is called: its name, or the last part of its directory."""
    if not isinstance(model, CausalLM):
        return os.fspath(model) if isinstance(model, str | os.PathLike) else ""
    return "" if model.source is None else os.path.basename(os.fspath(model.source).rstrip("/"))
