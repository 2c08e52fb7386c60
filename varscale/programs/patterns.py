"""Globs over paths: how rules of this package name leaves and subtrees.

A path is the keys of a leaf joined with "/" ("blocks/0/attn/kernel"). In a glob "*" stands for any part of one key, "?" for one
character, "[0-5]" for one of a set, "{a,b}" for one of a list, and "**" for any number of keys, none included. A glob that
names an inner node catches all that lies below it: "blocks/0" catches "blocks/0/attn/kernel". A dot separates keys just as "/"
does, so that the names of other frameworks can be written as they are. A compiled `re.Pattern` is searched for in the path
instead.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

Pattern = str | re.Pattern[str]
V = TypeVar("V")


def canonical(path: str) -> str:
    """The path with "/" between its keys, whatever separated them."""
    return path.replace(".", "/").strip("/")


def matches(pattern: Pattern, path: str) -> bool:
    """Whether the pattern catches the path or a node above it."""
    return _search(pattern, path) is not None


def caught(pattern: str, path: str) -> tuple[tuple[str, ...], str] | None:
    """What each "*" and "**" of a glob stands for in the path, and what lies below the node it names; None without a match."""
    found = _search(pattern, path)
    if found is None:
        return None
    *wildcards, below = (part or "" for part in found.groups())
    return tuple(wildcards), below


def substitute(pattern: Pattern, replacement: str, path: str) -> str | None:
    """The path with what the pattern caught replaced, or None where it catches nothing.

    The wildcards "*" and "**" of the replacement stand, in their order, for what those of the glob caught; what lies below the
    node that was caught is kept. For a compiled pattern the replacement is that of `re.sub`.

    Raises:
      ValueError: the replacement has more wildcards than the pattern.
    """
    if isinstance(pattern, re.Pattern):
        return canonical(pattern.sub(replacement, path)) if pattern.search(path) else None
    found = caught(pattern, path)
    if found is None:
        return None
    wildcards, below = found
    if len(re.findall(r"\*\*|\*", replacement)) > len(wildcards):
        raise ValueError(f"{replacement!r} has more wildcards than {pattern!r}, so there is nothing to put in their place")
    supply = iter(wildcards)
    filled = re.sub(r"\*\*|\*", lambda _: next(supply), canonical(replacement))
    return "/".join(key for key in f"{filled}/{below}".split("/") if key)


def first_match(rules: Iterable[tuple[Pattern, V]], path: str) -> tuple[int, V] | None:
    """The first rule that catches the path: its place in the list and its value."""
    return next(((place, value) for place, (pattern, value) in enumerate(rules) if matches(pattern, path)), None)


def matches_row(pattern: Pattern, path: str) -> bool:
    """Whether the pattern catches the row of a report at `path`, or a row that it belongs to.

    The globs are those of parameters, but "[" and "]" are literal, since they are part of row paths. What follows "[", "#", "@"
    or "." in a row's path lies below the module: "blocks/0" catches "blocks/0/attn", "blocks/0[1]", "blocks/0#1", "blocks/0@3"
    and "blocks/0.encode". A compiled `re.Pattern` is searched for in the path: `re.compile("^$")` catches the model's own
    output, path "", and nothing else.

    >>> [matches_row("blocks/*", path) for path in ("blocks/0", "blocks/0/attn", "blocks/0[1]", "head")]
    [True, True, True, False]
    >>> matches_row("blocks/*[1]", "blocks/0[1]"), matches_row("blocks/*[1]", "blocks/0[0]")
    (True, False)
    """
    if isinstance(pattern, str):
        return matches(_row_keys(pattern).replace("[", "[[]"), _row_keys(path))
    return matches(pattern, path)


def rows_caught(patterns: Pattern | Sequence[Pattern], paths: Iterable[str], name: str) -> tuple[str, ...]:
    """The row paths that at least one pattern catches, in their own order.

    Args:
      patterns: one or several.
      paths: paths of rows.
      name: what to call the patterns in errors.

    Raises:
      TypeError: a pattern is neither a glob nor a compiled `re.Pattern`.
      ValueError: there is no pattern, or one that catches none of the paths.
    """
    several = [patterns] if isinstance(patterns, str | re.Pattern) else patterns
    if not isinstance(several, Sequence):
        raise TypeError(f"{name} must be a pattern or a sequence of patterns, not {patterns!r}")
    if not several:
        raise ValueError(f"{name} must hold at least one pattern, not {patterns!r}")
    known = list(paths)
    caught = [{path for path in known if matches_row(pattern, path)} for pattern in several]
    for pattern, found in zip(several, caught, strict=True):
        if not found:
            some = ", ".join(map(repr, known[:4])) + (", ..." if len(known) > 4 else "")
            raise ValueError(f"{name}={text(pattern)!r} matches none of the {len(known)} rows: {some}")
    return tuple(path for path in known if any(path in found for found in caught))


def idle(patterns: Sequence[Pattern], paths: Iterable[str]) -> list[Pattern]:
    """The patterns that catch none of the paths, taken one by one (not first match)."""
    known = list(paths)
    return [pattern for pattern in patterns if not any(matches(pattern, path) for path in known)]


def text(pattern: Pattern) -> str:
    """The pattern as the user wrote it."""
    return f"/{pattern.pattern}/" if isinstance(pattern, re.Pattern) else pattern


def _row_keys(path: str) -> str:
    return canonical(re.sub(r"(?=[\[#@])", "/", path)).replace("//", "/")


def _search(pattern: Pattern, path: str) -> re.Match[str] | None:
    if isinstance(pattern, re.Pattern):
        return pattern.search(path)
    if not isinstance(pattern, str):
        raise TypeError(
            f"a pattern is {pattern!r} of type {type(pattern).__name__}; give a glob (str) or a compiled re.Pattern"
        )
    return _compiled(pattern).match(path)


@functools.lru_cache(maxsize=1024)
def _compiled(glob: str) -> re.Pattern[str]:
    """The glob as an anchored regular expression: a group a wildcard, and a last one for what lies below the node."""
    keys = [key for key in canonical(glob).split("/") if key]
    if not keys:
        return re.compile(r"(.*)\Z", re.DOTALL)
    expression, separator = "", ""
    for place, key in enumerate(keys):
        if key == "**":
            # It takes its separator along, for it may stand for no key at all.
            leads = place == 0 and len(keys) > 1
            expression += "(?:(.*)/)?" if leads else "(.*)" if place == 0 else "(?:/(.*))?"
            separator = "" if leads else "/"
        else:
            expression += separator + _key(key, glob)
            separator = "/"
    return re.compile(expression + r"(?:/(.*))?\Z", re.DOTALL)


def _key(key: str, glob: str) -> str:
    """One key of a glob as a regular expression."""
    expression, place = "", 0
    while place < len(key):
        character = key[place]
        close = {"[": "]", "{": "}"}.get(character)
        if close is not None:
            end = key.find(close, place + 1)
            if end < 0:
                raise ValueError(f"the glob {glob!r} opens {character!r} and never closes it")
            inside = key[place + 1 : end]
            if character == "[":
                inside = inside.replace("[", r"\[")
                expression += f"[{'^' + inside[1:] if inside.startswith('!') else inside}]"
            else:
                expression += "(?:" + "|".join(_uncaught(option) for option in inside.split(",")) + ")"
            place = end + 1
            continue
        expression += {"*": "([^/]*)", "?": "[^/]"}.get(character, re.escape(character))
        place += 1
    return expression


def _uncaught(option: str) -> str:
    return re.escape(option).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
