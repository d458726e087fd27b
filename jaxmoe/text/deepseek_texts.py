"""The words that DeepSeek-V3.2 and V4 were trained to see in prompts (deepseek_encoding.py)."""

TOOLS_V4 = (
    "## Tools\n"
    "\n"
    "You have access to a set of tools to help answer the user's question. You can "
    'invoke tools by writing a "<\uff5cDSML\uff5ctool_calls>" block like the following:\n'
    "\n"
    "<\uff5cDSML\uff5ctool_calls>\n"
    '<\uff5cDSML\uff5cinvoke name="$TOOL_NAME">\n'
    '<\uff5cDSML\uff5cparameter name="$PARAMETER_NAME" '
    'string="true|false">$PARAMETER_VALUE</\uff5cDSML\uff5cparameter>\n'
    "...\n"
    "</\uff5cDSML\uff5cinvoke>\n"
    '<\uff5cDSML\uff5cinvoke name="$TOOL_NAME2">\n'
    "...\n"
    "</\uff5cDSML\uff5cinvoke>\n"
    "</\uff5cDSML\uff5ctool_calls>\n"
    "\n"
    'String parameters should be specified as is and set `string="true"`. For all other '
    "types (numbers, booleans, arrays, objects), pass the value in JSON format and set "
    '`string="false"`.\n'
    "\n"
    "If thinking_mode is enabled (triggered by <think>), you MUST output your complete "
    "reasoning inside <think>...</think> BEFORE any tool calls or final response.\n"
    "\n"
    "Otherwise, output directly after </think> with tool calls or final response.\n"
    "\n"
    "### Available Tool Schemas\n"
    "\n"
    "{tool_schemas}\n"
    "\n"
    "You MUST strictly follow the above defined tool name and parameter schemas to "
    "invoke tool calls.\n"
)

TOOLS_V32 = (
    "## Tools\n"
    "\n"
    "You have access to a set of tools you can use to answer the user's question.\n"
    'You can invoke functions by writing a "<\uff5cDSML\uff5cfunction_calls>" block like the '
    "following as part of your reply to the user:\n"
    "<\uff5cDSML\uff5cfunction_calls>\n"
    '<\uff5cDSML\uff5cinvoke name="$FUNCTION_NAME">\n'
    '<\uff5cDSML\uff5cparameter name="$PARAMETER_NAME" '
    'string="true|false">$PARAMETER_VALUE</\uff5cDSML\uff5cparameter>\n'
    "...\n"
    "</\uff5cDSML\uff5cinvoke>\n"
    '<\uff5cDSML\uff5cinvoke name="$FUNCTION_NAME2">\n'
    "...\n"
    "</\uff5cDSML\uff5cinvoke>\n"
    "</\uff5cDSML\uff5cfunction_calls>\n"
    "\n"
    "String and scalar parameters should be specified as is without any escaping or "
    'quotes, while lists and objects should use JSON format. The "string" attribute '
    'should be set to "true" for string type parameters and "false" for other types '
    "(numbers, booleans, arrays, objects).\n"
    "\n"
    "If the thinking_mode is enabled, then after function results you should strongly "
    "consider outputting a thinking block. Here is an example:\n"
    "\n"
    "<\uff5cDSML\uff5cfunction_calls>\n"
    "...\n"
    "</\uff5cDSML\uff5cfunction_calls>\n"
    "\n"
    "<function_results>\n"
    "...\n"
    "</function_results>\n"
    "\n"
    "<think>...thinking about results</think>\n"
    "\n"
    "Here are the functions available in JSONSchema format:\n"
    "<functions>\n"
    "{tool_schemas}\n"
    "</functions>\n"
)

_ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the "
    "problem to resolve the root cause, rigorously stress-testing your logic against all "
    "potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every "
    "intermediate step, considered alternative, and rejected hypothesis to ensure "
    "absolutely no assumption is left unchecked.\n"
    "\n"
)
_BEYOND = (
    "Reasoning Effort: Beyond maximum \u2014 exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to "
    "chance: exhaustively decompose the problem into its most fundamental components, "
    "trace every causal chain to its root, and resolve the underlying cause rather than "
    "any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from "
    "multiple angles and are certain that no assumption remains unchecked and no error "
    "remains undiscovered.\n"
    "\n"
)
# By level; the first checkpoints had words for one level only.
EFFORTS = {"low": "", "high": _ABSOLUTE, "max": _BEYOND}
EFFORTS_FIRST = {"low": "", "high": "", "max": _ABSOLUTE}
