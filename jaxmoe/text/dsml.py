"""DSML, the markup of DeepSeek-V3.2's and V4's tool calls: tags whose names begin with one token.

What prompts (deepseek_encoding.py), the parser (tool_calls_dsml.py) and the grammars
(tool_grammar.py) share::

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true">TEXT</｜DSML｜parameter>
    <｜DSML｜parameter name="KEY" string="false">JSON</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

V3.2 calls the block `function_calls`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

DSML = "\uff5cDSML\uff5c"
# The block of calls, by the name of the tool format.
BLOCKS = {"deepseek_v32": "function_calls", "deepseek_v4": "tool_calls"}


def opening(name: str) -> str:
    """Of a tag without attributes."""
    return f"<{DSML}{name}>"


def closing(name: str) -> str:
    return f"</{DSML}{name}>"


def invoke_head(name: str) -> str:
    return f'<{DSML}invoke name="{name}">\n'


def parameter_head(key: str, *, is_string: bool) -> str:
    return f'<{DSML}parameter name="{key}" string="{"true" if is_string else "false"}">'


def parameters(arguments: Mapping[str, Any] | str) -> list[str]:
    """The tags of a call's arguments; text that is no JSON object is a parameter "arguments"."""
    if not isinstance(arguments, Mapping):
        arguments = {"arguments": arguments}
    return [
        parameter_head(key, is_string=isinstance(value, str))
        + (value if isinstance(value, str) else to_json(value))
        + closing("parameter")
        for key, value in arguments.items()
    ]


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
