"""Renders chat templates in a process of their own, which its limits may end.

A template is the checkpoint's code, and one operator can fill the memory or run for ever, which no
thread can be stopped from. This file is run by path, with no package around it; it reads one JSON
object a line (source, variables, messages) and answers with one: `text` or `error`.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import SandboxedEnvironment

# A text that no template holds, and that no filter for case or space changes.
_PROBE = "7083154926"


def main() -> None:
    """Answers requests until the input ends; arguments: seconds, bytes, characters, sys.path."""
    seconds, num_bytes, num_chars = map(int, sys.argv[1:4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    sys.path[:] = json.loads(sys.argv[4])
    environment = _environment()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY or most > num_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, most))
    templates: dict[str, tuple[Template, list[bool]]] = {}
    for line in sys.stdin.buffer:
        # The default action of the signal ends the process even inside a single operator.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = json.dumps(_answer(environment, templates, json.loads(line), num_chars))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _answer(
    environment: SandboxedEnvironment,
    templates: dict[str, tuple[Template, list[bool]]],
    request: dict[str, Any],
    num_chars: int,
) -> dict[str, Any]:
    import jinja2

    source, variables = request["source"], request["variables"]
    try:
        if source not in templates:
            templates[source] = (environment.from_string(source), [])
        template, wants_parts = templates[source]
        if "messages" not in variables:
            return {"text": ""}
        if not wants_parts:
            wants_parts.append(_wants_parts(template, variables))
        content = _as_parts if wants_parts[0] else _as_string
        messages = [
            {**m, "content": content(m["content"])} if "content" in m else m
            for m in variables["messages"]
        ]
        text = template.render({**variables, "messages": messages})
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error}"}
    except RecursionError:
        return {"error": "it is nested too deeply (recursion)"}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        return {"error": str(error) or type(error).__name__}
    if len(text) > num_chars:
        return {"error": f"it writes {len(text):,} characters, at most {num_chars:,} are allowed"}
    return {"text": text}


def _wants_parts(template: Template, variables: dict[str, Any]) -> bool:
    """Whether a string's text gets lost where that of a list of parts doesn't."""
    import jinja2

    for content in (_as_string, _as_parts):
        message = {"role": "user", "content": content(_PROBE)}
        try:
            if _PROBE in template.render({**variables, "messages": [message]}):
                return content is _as_parts
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError):
            pass  # the messages themselves will say what is wrong
    return False


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_string(content: Any) -> Any:
    if isinstance(content, list) and all(isinstance(p, dict) and "text" in p for p in content):
        return "\n".join(str(part["text"]) for part in content)
    return content


def _environment() -> SandboxedEnvironment:
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
            # Jinja's own would print as nothing and fail only when it is used.
            raise SecurityError(f"{attribute!r} of {type(obj).__name__} is out of bounds")

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; here it is just its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    environment.globals.update(functions)
    return environment


if __name__ == "__main__":
    main()
