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

LLAMA3_FIRST = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role "
    "+ '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
"""As Llama 3's first one: the generation prompt is always there."""

LLAMA3 = r"""
{{- bos_token }}
{%- if not date_string is defined %}{%- if strftime_now is defined %}
  {%- set date_string = strftime_now("%d %b %Y") %}
{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}
{%- if tools is not none and tools %}
  {%- for t in tools %}{{- t | tojson(indent=4) + '\n\n' }}{%- endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for m in messages %}
  {%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {{- m.content | trim + '<|eot_id|>' }}
  {%- elif 'tool_calls' in m %}
    {%- if m.tool_calls | length != 1 %}
      {{- raise_exception('This model only supports single tool-calls at once!') }}
    {%- endif %}
    {%- set call = m.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name
        + '", "parameters": ' }}
    {{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
    {%- if m.content is mapping or m.content is iterable %}{{- m.content | tojson }}
    {%- else %}{{- m.content }}{%- endif %}
    {{- '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
"""As Llama 3.2's: today's date, tools, results as JSON."""

GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles "
    "must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""As Gemma 2's: no system, turns alternate."""

MISTRAL = r"""
{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content %}{%- set messages = messages[1:] %}
{%- endif %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in messages %}
  {%- if m.role == 'user' %}
    {%- if tools is not none and tools and m == users[-1] %}
      {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
    {%- endif %}
    {%- if loop.last and system is defined %}
      {{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}
    {%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}
  {%- elif m.tool_calls is defined and m.tool_calls is not none %}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in m.tool_calls %}
      {{- (call.function | tojson)[:-1] }}
      {%- if call.id is not defined or call.id | length != 9 %}
        {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
      {%- endif %}
      {{- ', "id": "' + call.id + '"}' + (']' + eos_token if loop.last else ', ') }}
    {%- endfor %}
  {%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
  {%- elif m.role == 'tool' or m.role == 'tool_results' %}
    {{- '[TOOL_RESULTS] {"content": ' + m.content | string + '}[/TOOL_RESULTS]' }}
  {%- else %}
    {{- raise_exception('Only user and assistant roles are supported!') }}
  {%- endif %}
{%- endfor %}
"""
"""As Mistral's: the system's text only before a user's message that is the last one."""

PHI3 = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '<|system|>\n' + m.content + '<|end|>\n' }}"
    "{% elif m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content + '<|end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""As Phi-3's: other roles are left out without a word."""

DEEPSEEK = r"""
{%- set ns = namespace(system='') %}
{%- for m in messages %}{%- if m.role == 'system' %}{%- set ns.system = m.content %}{%- endif %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
  {%- if m.role == 'user' %}{{- '<|User|>' + m.content }}{%- endif %}
  {%- if m.role == 'assistant' and m.tool_calls is defined and m.tool_calls is not none %}
    {{- '<|Assistant|>' }}
    {%- for call in m.tool_calls %}
      {{- '<|tool_call|>' + call.function.name + '\n```json\n' + call.function.arguments
          + '\n```<|end_tool_call|>' }}
    {%- endfor %}
    {{- '<|end_of_sentence|>' }}
  {%- elif m.role == 'assistant' %}
    {%- set content = m.content %}
    {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
    {{- '<|Assistant|>' + content + '<|end_of_sentence|>' }}
  {%- endif %}
  {%- if m.role == 'tool' %}{{- '<|tool_output|>' + m.content + '<|end_tool_output|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}
"""
"""As DeepSeek-R1's: arguments are joined as text, thoughts are dropped, the last system counts."""

QWEN25 = r"""
{%- if tools %}
  {{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else '') }}
  {%- for t in tools %}{{- '\n' + t | tojson }}{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
  {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
  {%- if m.role == 'user' or (m.role == 'system' and not loop.first)
      or (m.role == 'assistant' and not m.tool_calls) %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- elif m.role == 'assistant' %}
    {{- '<|im_start|>assistant' }}{%- if m.content %}{{- '\n' + m.content }}{%- endif %}
    {%- for call in m.tool_calls %}
      {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
      {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
      {{- call.arguments | tojson }}{{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif m.role == 'tool' %}
    {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
"""As Qwen2.5's: tools, calls as JSON; other roles are left out without a word."""

FAMILIES = {
    "qwen2.5": QWEN25,
    "qwen3": QWEN3_HYBRID,
    "qwen3-thinking": QWEN3_THINKING,
    "llama3-first": LLAMA3_FIRST,
    "llama3": LLAMA3,
    "gemma2": GEMMA2,
    "mistral": MISTRAL,
    "phi3": PHI3,
    "deepseek": DEEPSEEK,
}
