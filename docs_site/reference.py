"""The pages of public names: those of `swaa_jax`, of its rooms and modules, of `kernels_pallas`."""

import importlib
import types
from collections.abc import Iterator
from typing import Any

GROUPS: dict[str, tuple[str, ...]] = {
    "Models and policies": (
        "swaa_jax.policy",
        "swaa_jax.models",
        "swaa_jax.checkpoint",
        "swaa_jax.lora",
        "swaa_jax.attention",
    ),
    "Answers": ("swaa_jax.infer", "swaa_jax.chats", "swaa_jax.engine", "swaa_jax.serve"),
    "Training": ("swaa_jax.data", "swaa_jax.losses", "swaa_jax.train", "swaa_jax.distill"),
    "Evaluation": (
        "swaa_jax.eval.run",
        "swaa_jax.eval.tasks",
        "swaa_jax.eval.judging",
        "swaa_jax.eval.report",
        "swaa_jax.eval.search",
        "swaa_jax.selection",
    ),
    "Measuring": ("swaa_jax.plan", "swaa_jax.bench", "swaa_jax.verify", "swaa_jax.costs"),
    "Machines and files": (
        "swaa_jax.runtime",
        "swaa_jax.sharding",
        "swaa_jax.storage",
        "swaa_jax.directories",
        "swaa_jax.configs",
        "swaa_jax.examples",
        "swaa_jax.records",
        "swaa_jax.progress",
        "swaa_jax.tables",
    ),
    "Kernels": ("kernels_pallas",),
}
"""Rooms by what they are for, in the order of the navigation. `tests/docs` holds them complete."""

TOP = "swaa_jax"


def pages() -> dict[str, str]:
    """Markdown by its place in the site: a page a room.

    A name that several rooms have is documented by one, `swaa_jax` before others, then the room
    that defines it; the others link there.
    """
    homes = _homes()
    return {_place(module): _page(module, homes) for module in (TOP, *rooms())}


def navigation() -> list[dict[str, Any]]:
    """What of it is in the navigation, in order."""
    groups = [
        {title: [{_short(name): _place(name)} for name in names]} for title, names in GROUPS.items()
    ]
    return [{"swaa_jax": _place(TOP)}, *groups]


def rooms() -> Iterator[str]:
    """The modules whose `__all__` is documented, apart from `swaa_jax` itself."""
    for names in GROUPS.values():
        yield from names


def public_names(module: str) -> list[tuple[str, str]]:
    """Each public name of a module, and the path that it is documented under.

    A package that is a function too (`swaa_jax.train`) is documented as the function.
    """
    room = importlib.import_module(module)
    named = []
    for name in [name for name in getattr(room, "__all__", ()) if not name.startswith("__")]:
        value = getattr(room, name, None)
        path = f"{module}.{name}"
        if isinstance(value, types.ModuleType):  # a package that is a function too
            value, path = getattr(value, name, None), f"{path}.{name}"
        if value is not None:
            named.append((name, _unambiguous(path, value)))
    return named


def documented() -> dict[str, list[tuple[str, str]]]:
    """The same, by module, without the names that another module's page documents."""
    homes = _homes()
    return {
        module: [each for each in public_names(module) if homes[_key(each[1])][0] == module]
        for module in (TOP, *rooms())
    }


def find(path: str) -> Any:
    """The object of such a path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def _homes() -> dict[Any, tuple[str, str]]:
    """The module on whose page each name is documented, and the path under which it is."""
    top = {_key(path) for _, path in public_names(TOP)}
    homes: dict[Any, tuple[str, str]] = {}
    for module in (TOP, *rooms()):
        for _, path in public_names(module):
            key = _key(path)
            if key not in homes or (key[0].startswith(f"{module}.") and key not in top):
                homes[key] = module, path
    return homes


def _page(module: str, homes: dict[Any, tuple[str, str]]) -> str:
    about = (importlib.import_module(module).__doc__ or "").partition("\n\n")[0]
    if module == TOP:
        about = "`import swaa_jax as swaa` has these names; the pages of rooms have more."
    here, elsewhere = [], []
    for name, path in public_names(module):
        where, home = homes[_key(path)]
        here += [f"::: {path}"] if where == module else []
        elsewhere += [f"[`{name}`][{home}]"] if where != module else []
    text = [f"# {_short(module)}", about.replace("\n", " ")]
    if elsewhere:
        text.append(f"Documented elsewhere: {', '.join(elsewhere)}.")
    return "\n\n".join([*text, *here]) + "\n"


def _unambiguous(path: str, value: Any) -> str:
    """Another path of a function that has the name of the module that it is in."""
    name = path.rpartition(".")[2]
    return f"{value.__module__}.{name}" if name in _key(path)[0].split(".") else path


def _key(path: str) -> tuple[str, str]:
    """What tells that two paths are one name: where it is defined; of a constant, its name."""
    value = find(path)
    if isinstance(value, type | types.FunctionType):
        return value.__module__, value.__qualname__
    return "", path.rpartition(".")[2]


def _short(module: str) -> str:
    return module.removeprefix("swaa_jax.")


def _place(module: str) -> str:
    return f"reference/{module}.md"
