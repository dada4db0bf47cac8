"""YAML text -> plain values, strictly: no alias, no key twice, no tag that runs code.

Aliases are refused because a few lines of them stand for billions of values, repeated
keys because the first would be dropped in silence.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_CHARACTERS = 1 << 20

# What the safe loader raises beside its own errors, for `2024-13-45` or `!!bool maybe`.
_SLIPS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


def read_yaml(text: str) -> Any:
    """Read one YAML document.

    Raises:
        ValueError: it is none; says where and why, in one line.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"over {MAX_CHARACTERS >> 20} MB of settings")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"not readable as YAML{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        reason = getattr(error, "reason", "") or "it can't be parsed"
        raise ValueError(f"not readable as YAML: {reason}") from None
    except RecursionError:
        raise ValueError("not readable as YAML: nested too deeply") from None
    except _SLIPS as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"not readable as YAML: {first}") from None


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "aliases are not taken", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "a key stands twice", node.start_mark
            )
        return found
