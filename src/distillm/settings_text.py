"""YAML as settings are written in: the safe loader, with bounds, and one kind of error for all that is wrong."""

from collections.abc import Mapping
from typing import Any, cast

import yaml

DEEPEST, MOST = 50, 100_000
"""How deep values may be nested, and how many there may be, those that an alias repeats counted each time."""
DIGITS = 300
"""Of a whole number: a float holds no more."""


class _Loader(yaml.SafeLoader):
    """The safe loader; a key that is there twice is an error, where YAML itself would take the last silently.

    So is what is nested too deeply, as soon as it is met: the time that YAML takes rises with the square of the depth.
    """

    depth = -1

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in cast(list[tuple[yaml.Node, yaml.Node]], node.value):
            name = str(key.value)
            if isinstance(key, yaml.ScalarNode) and name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"the key {name!r:.60} is there twice", problem_mark=key.start_mark)
            seen |= {name} if isinstance(key, yaml.ScalarNode) else set()
        return node


def load_yaml(text: str) -> Any:
    """What one YAML document says, by plain types only.

    Raises:
        ValueError: it is not YAML, a value is not of its tag, or ``check`` refuses it.
    """
    try:
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:  # the loader's, or Python's own, by names of names
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    except (AttributeError, LookupError, TypeError) as error:  # such as !!timestamp before what is none
        raise ValueError(f"a value is not what its tag says ({type(error).__name__}: {error})") from error
    check(value)
    return value


def check(value: Any) -> None:
    """Refuse what could not be written back, shown, or gone through in a moment.

    Raises:
        ValueError: values are nested too deeply or within themselves, are too many, or a number is too long; or a text
            holds a NUL or half of a character.
    """
    left = [(value, 0)]
    met = 0
    while left:
        one, depth = left.pop()
        met += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels, or a value holds itself")
        if met > MOST:
            raise ValueError(f"it has more than {MOST} values, with those that aliases repeat")
        if isinstance(one, Mapping):
            inner = cast(Mapping[Any, Any], one)
            left += [(part, depth + 1) for pair in inner.items() for part in pair]
        elif isinstance(one, list | tuple | set):
            left += [(part, depth + 1) for part in cast(list[Any], one)]
        elif isinstance(one, int) and abs(one) >= 10**DIGITS:
            raise ValueError(f"a number has more than {DIGITS} digits")
        elif isinstance(one, str) and ("\0" in one or not _whole(one)):
            raise ValueError(f"the text {one!r:.60} holds a NUL, or half of a character")


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
