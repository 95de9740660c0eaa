"""Chat templates that break jinja, its sandbox, or the machine."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from damage import Damage

__all__ = ["odd_template"]

_PIECES = (
    *("{% break %}", "{% continue %}", "{{", "{%", "{#", "%}", "{% endfor %}", "{% else %}"),
    *("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",),
    *("{{ 'a' * 10**9 }}", "{{ 'a' * 10**6 }}", "{{ '%1000000000d' % 1 }}", "{{ 10**10**8 }}"),
    *("{{ [0] * 10**10 }}", "{{ 'a'.ljust(10**10) }}", "{{ '{:1000000000}'.format(1) }}"),
    *("{{ 'ab' | center(10**9) }}", "{{ 'a' | replace('', 'b' * 10**6) }}", "{{ range(10**9) }}"),
    *("{% set x = [0] %}{% for i in range(99) %}{% set x = x + x %}{% endfor %}{{ x }}",),
    *(
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
    ),
    *("{% extends 'x' %}", "{{ self }}", "{{ super() }}", "{{ caller() }}", "{{ loop.index }}"),
    *("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__ }}"),
    *("{{ lipsum(n=10**6) }}", "{{ lipsum() }}", "{{ raise_exception('\x1b[31mno\nway') }}"),
    *("{{ raise_exception('A' * 100000) }}", "{{ raise_exception(1) }}", "{{ raise_exception() }}"),
    *(
        "{{ strftime_now('%') }}",
        "{{ strftime_now('\\ud800') }}",
        "{{ strftime_now('a' * 10**6) }}",
    ),
    *("{{ '\\ud800' }}", "{{ '\\x00' }}", "{{ messages | tojson(indent='x') }}", "{{ 1 / 0 }}"),
    *("{{ x.y.z }}", "{{ messages[99] }}", "{{ messages | sort }}", "{{ messages | sum }}"),
    *("{{ none + 1 }}", "{{ 1 | round('x') }}", "{{ 'x' | int(base=99) }}", "{{ {}|tojson|safe }}"),
    *(
        "{{ messages | tojson(separators=3) }}",
        "{{ dict(a=messages) | tojson }}",
        "{{ 0 | batch }}",
    ),
    *("{{ '" + "A" * 200_000 + "' }}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"),
    *("{% if 1 %}" * 500 + "{% endif %}" * 500, "{{ " + "-" * 5000 + "1 }}", "{{ x" + ".x" * 5000),
    *(
        "{{ " + "[" * 200 + "]" * 200 + " }}",
        "{{ 1" + "+1" * 20_000 + " }}",
        "{{ bos_token }}" * 99,
    ),
    *(
        "{% generation %}",
        "{% generation %}x{% endgeneration %}",
        "{% filter upper %}x{% endfilter %}",
    ),
    *("{{ namespace(a=1).a }}", "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns.a.a }}"),
    *("{{ messages | map(attribute='content') | join }}", "{{ messages | selectattr('x', 'no') }}"),
    *(
        "{{ '' | format(*range(9)) }}",
        "{{ 9 | filesizeformat }}",
        "{% autoescape true %}{% endautoescape %}",
    ),
)


def odd_template(rng: Random, path: Path) -> Damage:
    """Puts an odd piece into a template, alone or amid the sound one.

    Args:
        rng: Decides.
        path: chat_template.jinja, or a tokenizer_config.json that holds one.

    Returns:
        What was done.
    """
    piece = rng.choice(_PIECES)
    if rng.random() < 0.2:
        piece += rng.choice(_PIECES)
    data = json.loads(path.read_bytes()) if path.suffix == ".json" else {}
    sound = data["chat_template"][-1]["template"] if data else path.read_text()
    at = rng.randrange(len(sound) + 1)
    text = piece if rng.random() < 0.5 else sound[:at] + piece + sound[at:]
    note = f"template with {piece:.60}"
    if not data:
        path.write_text(text)
        return Damage(note=note, allowed="any")
    odd = rng.choice((["a"], None, 3, {}, "default", "default", "default", "tool"))
    data["chat_template"] = rng.choice(
        (text, [{"name": odd, "template": text}], [{"name": "default", "template": odd}], [odd])
    )
    path.write_text(json.dumps(data))
    return Damage(note=f"{note}, named {odd!r}", allowed="any")
