"""Chat templates like those of the families, small enough to read."""

_QWEN3 = r"""
{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last_user=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last_user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set content = m.content %}
    {%- set reasoning = '' %}
    {%- if m.reasoning_content is string %}
      {%- set reasoning = m.reasoning_content %}
    {%- elif '</think>' in content %}
      {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
      {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > ns.last_user and (loop.last or reasoning) %}
      {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {{- content.lstrip('\n') + '<|im_end|>\n' }}
  {%- else %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n' }}
  GENERATION_PROMPT
{%- endif %}
"""
QWEN3_THINKING = _QWEN3.replace("GENERATION_PROMPT", r"{{- '<think>\n' }}")
"""As Qwen3-Thinking-2507: the generation prompt opens the thinking; old reasoning is dropped."""

QWEN3_HYBRID = _QWEN3.replace(
    "GENERATION_PROMPT",
    r"{%- if enable_thinking is defined and not enable_thinking %}"
    r"{{- '<think>\n\n</think>\n\n' }}{%- endif %}",
)
"""As Qwen3: `enable_thinking=False` closes the thinking in the generation prompt."""

PLAIN_TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}Answer: {% generation %}"
    "{{ m.content }}{% endgeneration %}\n\n{% else %}Question: {{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}"
)
"""No special tokens; the template marks what is generated."""

TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
"""As Phi-3: the turn's end, and the end token behind the last turn."""
