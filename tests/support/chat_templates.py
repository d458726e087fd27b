"""Chat templates in the public style of three families, written for these tests: the marks, the
order and the switches are those of the model cards, the wording is ours.
"""

DEEPSEEK_V31 = """
{%- if thinking is not defined %}{% set thinking = false %}{% endif -%}
{%- set ns = namespace(system='') -%}
{%- for m in messages if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] %}
{%- endfor -%}
{{- bos_token + ns.system -}}
{%- if tools %}{{ '\n\n## Tools\n' }}
{%- for tool in tools %}
{{- '### ' + tool.function.name + '\nParameters: ' + (tool.function.parameters | tojson) + '\n' }}
{%- endfor %}{% endif -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{{- '<｜User｜>' + m['content'] -}}
{%- elif m['role'] == 'assistant' -%}
{{- '<｜Assistant｜></think>' + (m['content'] or '') -}}
{%- if m.tool_calls -%}
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in m.tool_calls -%}
{{- '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' -}}
{{- call['function']['arguments'] + '<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{{- '<｜end▁of▁sentence｜>' -}}
{%- elif m['role'] == 'tool' -%}
{{- '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if messages[-1]['role'] == 'user' %}{{ '<｜Assistant｜>' }}{% endif -%}
{{- '<think>' if thinking and not tools else '</think>' -}}
{%- endif -%}
"""

QWEN3 = """
{%- if tools %}
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- '# Tools\n<tools>' }}
{%- for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}
{{- '\n</tools>\nAnswer with {"name": NAME, "arguments": OBJECT} in <tool_call></tool_call>.' }}
{{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'user' %}
{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\n' + content.split('</think>')[-1].lstrip('\n') }}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{ call.function.arguments }}
{%- else %}{{ call.function.arguments | tojson }}{% endif %}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}
"""

KIMI_K2 = """
{%- if tools -%}
{{- '<|im_system|>tool_declare<|im_middle|>' + (tools | tojson) + '<|im_end|>' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
<|im_user|>user<|im_middle|>{{ m['content'] }}<|im_end|>
{%- elif m['role'] == 'system' -%}
<|im_system|>system<|im_middle|>{{ m['content'] }}<|im_end|>
{%- elif m['role'] == 'assistant' -%}
<|im_assistant|>assistant<|im_middle|><think>{{ m['reasoning_content'] or '' }}</think>
{{- m['content'] or '' -}}
{%- if m.get('tool_calls') -%}
<|tool_calls_section_begin|>
{%- for call in m['tool_calls'] -%}
<|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>
{{- call['function']['arguments'] | tojson -}}<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>
{%- endif -%}<|im_end|>
{%- elif m['role'] == 'tool' -%}
<|im_system|>tool<|im_middle|>## Return of {{ m.tool_call_id }}
{{ m['content'] }}<|im_end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""

# Qwen3-Coder walks through the arguments' items; DeepSeek-V3 has another head and a code block.
QWEN3_CODER = QWEN3.replace(
    """{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{ call.function.arguments }}
{%- else %}{{ call.function.arguments | tojson }}{% endif %}
{{- '}\n</tool_call>' }}
""",
    """{{- '\n<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\n' }}
{{- (value if value is string else value | tojson) + '\n</parameter>\n' }}
{%- endfor %}
{{- '</function>\n</tool_call>' }}
""",
)
DEEPSEEK_V3 = DEEPSEEK_V31.replace(
    """'<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>'""",
    """'<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call['function']['name'] + '\n```json\n'""",
).replace(
    "call['function']['arguments'] + '<｜tool▁call▁end｜>'",
    "call['function']['arguments'] + '\n```<｜tool▁call▁end｜>'",
)
