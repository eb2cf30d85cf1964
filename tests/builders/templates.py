"""Chat templates that tests share."""

from __future__ import annotations

THINKING = (
    "{% macro turn(m) %}<{{ m['role'] }}> {{ m['content'] }} {{ '<end> ' if closed is not defined else closed }}"
    "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> "
    "{% if enable_thinking is defined and not enable_thinking %}w0 {% endif %}"
    "{% endif %}"
)
