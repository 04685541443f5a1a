"""What is wrong with a configuration, in its user's words: of each key what goes there, and what was found."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

# reads what a key's value is as it stands in the file, before YAML makes a date, a number or a truth of it
Written = Callable[[tuple[Any, ...]], str | None]
LONG = 200  # characters of a value that are shown
OWN = ("value_error", "assertion_error", "missing")  # errors whose words are not made of the field's type


def explain(
    model: type[BaseModel], error: ValidationError, remedy: dict[str, str], written: Written = lambda _: None
) -> list[str]:
    """A clause for each key that is wrong: the key, what goes there, and what was found.

    Parameters
    ----------
    model : that refused.
    remedy : what to write, by the pattern that a text has to match.
    written : gives the text of a value by its path.
    """
    clauses = []
    for one in error.errors():
        loc, value = one["loc"], one["input"]
        if one["type"] == "truth":
            loc, value = (*loc, one["ctx"]["key"]), one["ctx"]["value"]
        if one["type"] in ("extra_forbidden", "invalid_key"):
            clauses.append(_unknown(model, one["loc"]))
            continue
        path, kind = _place(model, loc)
        name = ".".join(map(str, path))
        pattern = one.get("ctx", {}).get("pattern")
        if one["type"] in OWN or pattern in remedy:
            told = one["msg"].removeprefix("Value error, ") if one["type"] != "missing" else "is missing"
            told = remedy.get(pattern, told) + ("" if isinstance(value, dict) else f" (got {_text(value)})")
        else:
            text = written(path)
            stands = text is not None and yaml.safe_load(text) == value  # a command line may say another
            told = _wanted(kind, value, text if stands else None)
        clauses.append(f"{name}: {told}" if name else told)
    return list(dict.fromkeys(clauses))  # the kinds that a value may be of are refused one by one


def refuse_truth(model: type[BaseModel], values: Any) -> None:
    """Refuse true and false where they would be taken for 1 and 0."""
    for name, value in values.items() if isinstance(values, dict) else ():
        field = model.model_fields.get(name)
        if isinstance(value, bool) and field is not None and bool not in _kinds(field.annotation):
            raise PydanticCustomError("truth", "{key} is a truth", {"key": name, "value": value})


def as_written(text: str, loader: Any) -> Written:
    """Look values up in a YAML text."""

    def find(path: tuple[Any, ...]) -> str | None:
        node = yaml.compose(text, loader)
        for part in path:
            if isinstance(node, yaml.MappingNode):
                node = next((value for key, value in node.value if key.value == part), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
            else:
                return None
        plain = isinstance(node, yaml.ScalarNode) and node.style is None and len(node.value) <= LONG
        return node.value if plain else None

    return find


def _place(model: Any, loc: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """The part of pydantic's path that a user wrote, and the kind of value that goes there."""
    path, kind = [], model
    for part in loc:
        section = next((one for one in _kinds(kind) if _is_section(one)), None)
        if section is not None and part in section.model_fields:
            field = section.model_fields[part]
            kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        elif isinstance(part, int) and (
            items := [get_args(one)[0] for one in _kinds(kind) if get_origin(one) is tuple]
        ):
            kind = items[0]
        else:
            break  # the name of one of several kinds
        path.append(part)
    return tuple(path), kind


def _kinds(kind: Any, *limits: Any) -> Iterator[Any]:
    """The kinds that a union is of, without limits."""
    return (one for one, _ in _limited(kind, limits))


def _limited(kind: Any, limits: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The kinds that a union is of, each with its limits: annotated-types' Ge, Gt, Le, Lt."""
    if get_origin(kind) is Annotated:
        base, *more = get_args(kind)
        yield from _limited(base, (*limits, *(one for some in more for one in getattr(some, "metadata", [some]))))
    elif get_origin(kind) in (Union, types.UnionType):
        for one in get_args(kind):
            yield from _limited(one, limits)
    else:
        yield kind, limits


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _wanted(kind: Any, value: Any, written: str | None) -> str:
    """What goes into a place, and what was found there."""
    kinds = [one for one in _limited(kind) if one[0] is not type(None)]
    shown = _text(value) if written is None else written
    got = f" (got {shown})"
    section = next((one for one, _ in kinds if _is_section(one)), None)
    if section is not None and value is not None:
        return f"has keys of its own ({', '.join([*section.model_fields][:3])} ...), indented below it{got}"
    if section is not None:
        return "is empty; indent its keys below it, or leave it out"
    if any(get_origin(one) is tuple for one, _ in kinds) and not isinstance(value, (list, tuple)):
        if isinstance(value, dict):
            return "give a list: each entry starts with '- '"
        return f"give a list: [{shown}]" if value is not None else "is empty; give a list: [A, B], or leave it out"
    if all(one is str for one, _ in kinds) and not isinstance(value, (str, dict, list, tuple)) and value is not None:
        taken = {bool: "true or false", int: "a number", float: "a number"}.get(type(value), "a date")
        return f'give a text: "{shown}", in quotes, as YAML takes it for {taken}'
    if isinstance(value, bool) and written not in (None, str(value), str(value).lower()):
        got = f" (got {shown}, which YAML takes for {str(value).lower()})"
    words = [str(word) for one, limits in kinds for word in _words(one, limits)]
    choices = [str(word) for one, _ in kinds if get_origin(one) is Literal for word in get_args(one)]
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.6) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    told = " or ".join([", ".join(words[:-1]), words[-1]] if words[:-1] else words)
    return f"is empty; give {told}, or leave it out" if value is None else f"give {told}{hint}{got}"


def _words(kind: Any, limits: tuple[Any, ...]) -> list[Any]:
    """What goes into a place, in words: one for each choice."""
    if get_origin(kind) is Literal:
        return [str(one).lower() if isinstance(one, bool) else one for one in get_args(kind)]
    if get_origin(kind) is tuple:
        shortest = next((limit.min_length for limit in limits if hasattr(limit, "min_length")), 0)
        return ["a list of one at least" if shortest else "a list"]
    if kind is bool:
        return ["true or false"]
    if kind is str:
        return ["a text"]
    ends = {name: getattr(limit, name) for limit in limits for name in ("ge", "gt", "le", "lt") if hasattr(limit, name)}
    told = {"ge": "from {}", "gt": "above {},", "le": "to {}" if "ge" in ends else "at most {}", "lt": "below {}"}
    bounds = [told[name].format(f"{end:,}" if kind is int else f"{end:,.10g}") for name, end in ends.items()]
    return [" ".join(["a whole number" if kind is int else "a number", *bounds])]


def _text(value: Any) -> str:
    """A value as YAML would have it, for whatever is no text; a text in quotes."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, TypeError):  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= LONG else f"{text[:LONG]} ..."


def _unknown(model: type[BaseModel], loc: tuple[Any, ...]) -> str:
    """What to say of a key that there is not: the one that was meant, in its place or elsewhere."""
    *above, key = loc
    path, kind = _place(model, tuple(above))
    at, here = ".".join(map(str, path)), [*next(one for one in _kinds(kind) if _is_section(one)).model_fields]
    named = {other: other.rpartition(".")[2] for other in _paths(model)}
    near = difflib.get_close_matches(str(key), here, n=1, cutoff=0.6)
    far = difflib.get_close_matches(str(key), [*named.values()], n=1, cutoff=0.75)
    if near and str(key) not in named.values():
        places = [".".join(filter(None, [at, near[0]]))]
    else:
        places = [other for other, last in named.items() if far and last == far[0]]
        places = [other for other in places if "." not in other] or places
    if not places:
        hint = f"valid keys: {', '.join(here)}"
    elif at and "." not in places[0]:
        hint = f"'{places[0]}' stands in no section: write it at the beginning of a line"
    else:
        hint = "did you mean '" + "' or '".join(places) + "'?"
    return f"unknown key '{'.'.join(map(str, loc))}'; {hint}"


def _paths(model: type[BaseModel], at: str = "") -> list[str]:
    """All keys below a model, each with the sections above it."""
    found = []
    for name, field in model.model_fields.items():
        found.append(at + name)
        for one in _kinds(field.annotation):
            if _is_section(one):
                found += _paths(one, f"{at}{name}.")
    return found
