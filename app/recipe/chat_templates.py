"""Chat templates that a recipe may name. Jinja as data: nothing here or later ever renders one."""

from __future__ import annotations

from collections.abc import Mapping

from app.errors import Problem

AUTO = "auto"
CHAT_TEMPLATES: Mapping[str, str] = {
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + '\\n\\n' }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ (message['content'] | trim) + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        "{% set told = namespace(system='') %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set told.system = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + told.system + message['content'] + ' [/INST]' }}{% set told.system = '' %}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
        "{% endif %}"
        "{% endfor %}"
    ),
}


def template_text(wanted: str) -> str | None:
    """The template a recipe means by ``wanted``: that of a name, or the text itself. None: neither (or ``auto``)."""
    if "{" in wanted:
        return wanted
    return CHAT_TEMPLATES.get(wanted)


def check_chat_template(wanted: str) -> Problem | None:
    """A problem unless ``wanted`` is ``auto``, a known name or a text with Jinja in it."""
    if any("\ud800" <= character <= "\udfff" for character in wanted):
        message = "`chat_template` holds half a surrogate pair, which no file can; remove it."
        return Problem(code="recipe_invalid", message=message, where="chat_template")
    if wanted == AUTO or template_text(wanted) is not None:
        return None
    known = ", ".join((AUTO, *CHAT_TEMPLATES))
    message = f"`chat_template` is {known}, or the text of a Jinja template; {wanted[:80]!r} is none of them."
    return Problem(code="recipe_invalid", message=message, where="chat_template")
