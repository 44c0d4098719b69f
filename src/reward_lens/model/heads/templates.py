"""How authors write a conversation whose checkpoints have no chat template: Jinja, after the models' cards.

A BOS that the authors' tokenizer adds is written by the template, once, since a rendered text gets no special tokens.
"""

ULTRA = (
    "{{ bos_token }}{% for m in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ {'user': 'Human: ', 'assistant': 'Assistant: '}.get(m['role'], '') }}{{ m['content'] }}{% endfor %}"
)
"""UltraRM-13b: Human: ... Assistant: ..."""

EURUS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [\\\\INST]' }}{% endif %}{% endfor %}"
)
"""Eurus-RM-7b. The backslash stands on its card."""

BEAVER = (
    "{{ bos_token }}BEGINNING OF CONVERSATION: {% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ 'ASSISTANT:' + m['content'] }}{% if not loop.last %}{{ eos_token }}{% endif %}"
    "{% else %}{{ 'USER: ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
)
"""beaver-7b: the prompts of safe-rlhf, the last answer without an EOS as on the cards."""

OASST = (
    "{% for m in messages %}{{ {'user': '<|prompter|>', 'assistant': '<|assistant|>'}.get(m['role'], '<|system|>') }}"
    "{{ m['content'] }}<|endoftext|>{% endfor %}"
)
"""OpenAssistant's Pythia models."""

STARLING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
    "{% else %}{{ bos_token + '[INST] ' + m['content'] + ' </s> [/INST]' }}{% endif %}{% endfor %}"
)
"""Starling-RM-7B-alpha."""
