import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamac.runtime.text.chat_template import ChatTemplate, RenderLimits
from llamac.runtime.text.tokenizer_files import load_tokenizer

BOS, EOS = "<|begin_of_text|>", "<|eot_id|>"
MARKS = [BOS, EOS, "<|start_header_id|>", "<|end_header_id|>"]

BRACKETS = """
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 is even) -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- endif -%}
    {%- if turn['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + turn['content'].strip() -}}
        {{- ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + turn['content'] + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

HEADERS = """{{ bos_token }}
{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content | trim }}{{ '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content | trim }}<|eot_id|>
    {%- endif %}
{% endfor %}
{% if tools is not none %}tools{% endif %}
{% if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{% endif %}
"""

PLAIN = """A chat.
{% for message in messages %}
  {% if message['role'] == 'system' %}
    {% continue %}
  {% endif %}
  {% if loop.index > 8 %}
    {% break %}
  {% endif %}
{{ {'user': 'USER', 'assistant': 'ASSISTANT'}[message['role']] }}: {{ message['content'] }}
  {%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}

{% endfor %}
{{ messages[0] | tojson(indent=1) }}
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""

CONVERSATION = [
    {"role": "system", "content": " Be <b>brief</b> & 'kind' é. "},
    {"role": "user", "content": "Hello,\n  there "},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "漢字 {{ bos_token }}?"},
]


@pytest.fixture(scope="module")
def library():
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(MARKS)
    return made


@pytest.fixture
def folder(library, tmp_path):
    library.save(str(tmp_path / "tokenizer.json"))

    def write(**config):
        tokens = {"bos_token": {"content": BOS}, "eos_token": EOS, "add_bos_token": True}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens | config))
        return tmp_path

    return write


# A comment; a template without the word is refused.
NAMED = "{# messages #}"


def render(folder, template, messages=CONVERSATION, **options):
    is_named = isinstance(template, list) or "messages" in template
    source = template if is_named else NAMED + template
    return ChatTemplate.load(folder(chat_template=source)).render(messages, **options)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:2]])
@pytest.mark.parametrize("template", [BRACKETS, HEADERS, PLAIN])
def test_rendering_is_what_transformers_renders(library, folder, template, messages, prompt):
    import transformers

    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token=BOS, eos_token=EOS, chat_template=template
    )
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert render(folder, template, messages, add_generation_prompt=prompt) == expected
    ids = reference.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    tokenizer = load_tokenizer(folder())
    assert tokenizer.encode(expected, bos=False, special=True) == list(ids)


def test_a_rendered_prompt_has_the_templates_bos_alone(folder):
    text = render(folder, HEADERS)
    tokenizer = load_tokenizer(folder())
    ids = tokenizer.encode(text, bos=False, special=True)
    assert ids.count(tokenizer.bos_id) == 1
    assert text.rstrip().endswith("<|start_header_id|>assistant<|end_header_id|>")


@given(content=st.text() | st.text("{}%# bos_token"))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_message_is_never_read_as_a_template(folder, content):
    template = ChatTemplate.load(folder(chat_template="{{ messages[0].content }}"))
    assert template.render([{"role": "user", "content": content}]) == content


# where the template comes from


def test_the_default_of_several_templates(folder):
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": NAMED + "d"}]
    assert render(folder, several) == "d"
    with pytest.raises(ValueError, match=r"\['tool_use'\], none named default"):
        render(folder, several[:1])


def test_a_template_file_of_the_checkpoint_wins_over_its_config(folder):
    where = folder(chat_template="config")
    (where / "chat_template.jinja").write_text(f"{NAMED}file é", encoding="utf-8")
    assert ChatTemplate.load(where).render([]) == "file é"


def test_a_given_file_wins(folder, tmp_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text(NAMED + "{{ bos_token }}{{ eos_token }}mine")
    assert ChatTemplate.load(folder(chat_template="x"), mine).render([]) == BOS + EOS + "mine"


def test_tokens_come_from_the_tokenizer_where_no_file_names_them(folder, tmp_path):
    where = folder()
    (where / "tokenizer_config.json").unlink()
    (where / "config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": [257]}))
    mine = tmp_path / "mine.jinja"
    mine.write_text(NAMED + "{{ bos_token }}-{{ eos_token }}")
    assert ChatTemplate.load(where, mine).render([]) == f"{BOS}-{EOS}"


def test_no_template_is_an_error_that_says_what_to_do(folder, tmp_path):
    with pytest.raises(ValueError, match="no chat template; give one with --chat-template"):
        ChatTemplate.load(folder())
    with pytest.raises(FileNotFoundError, match="--chat-template"):
        ChatTemplate.load(folder(), tmp_path / "none.jinja")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        ChatTemplate.load(folder(), tmp_path / "binary.jinja")
    with pytest.raises(ValueError, match="not a file"):
        ChatTemplate.load(folder(), tmp_path)


# what a template may not do


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ lipsum.__globals__ }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ namespace(__class__=1).__class__ }}",
    ],
)
def test_the_sandbox_refuses(folder, source):
    with pytest.raises(ValueError, match="the chat template failed"):
        render(folder, source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only\n two roles') }}", "failed: only two roles;"),
        ("{{ messages[0].nothing.here }}", "no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ strftime_now(3) }}", "strftime"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'other' %}", "chat template failed"),
    ],
)
def test_a_failing_template_is_one_line(folder, source, message):
    with pytest.raises(ValueError, match=message) as caught:
        render(folder, source)
    assert "\n" not in str(caught.value)


def test_a_template_that_does_not_compile_names_the_line(folder):
    with pytest.raises(ValueError, match=r"does not compile, line 2.*--chat-template"):
        render(folder, "a\n{% if %}")


@pytest.mark.parametrize("source", ["", " \n", "../x", "{{ bos_token }}"])
def test_a_template_without_the_messages_is_refused(folder, source):
    """It made every conversation the same prompt."""
    with pytest.raises(ValueError, match="the chat template never writes the messages; give"):
        ChatTemplate.load(folder(chat_template=source))


@pytest.mark.parametrize(
    "source",
    [
        "{% break %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
        "{{ x.\x1b[31m }}",
    ],
)
def test_what_breaks_the_compiler_is_one_line(folder, source):
    """SyntaxError, RecursionError: tracebacks; and an escape that reached the terminal."""
    with pytest.raises(ValueError, match="does not compile") as caught:
        render(folder, source)
    assert str(caught.value).isprintable()


# limits

SMALL = RenderLimits(seconds=1, num_bytes=2**28, num_chars=10_000)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "took longer than 1 s",
        ),
        ("{{ 7 ** (9 ** 8) }}", "took longer than 1 s"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
            "{{ f(99) }}",
            "took longer",
        ),
        ("{{ 'a' * 10**9 }}", "too much memory"),
        ("{{ '%1000000000d' % 1 }}", "too much memory"),
        ("{{ '{:1000000000}'.format(1) }}", "too much memory"),
        ("{{ 'a' | center(10**9) }}", "too much memory"),
        ("{{ range(9999) | join('a' * 10**6) }}", "too much memory"),
        (
            "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
            "{% endfor %}{{ n.s }}",
            "too much memory",
        ),
        ("{{ 'a' * 10001 }}", "writes 10,001 characters, at most 10,000"),
    ],
)
def test_time_memory_and_length_are_bounded(source, message):
    """Nothing ended a template but the end of memory, with a traceback."""
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, {}, SMALL).render([{"role": "user", "content": "a"}])


def test_a_process_that_was_ended_is_started_again():
    source = "{% if messages[0].content == 'x' %}{{ 'a' * 10**9 ** 9 }}{% endif %}ok"
    template = ChatTemplate(source, {}, SMALL)
    for content in ("a", "x", "a", "x", "a"):
        message = {"role": "user", "content": content}
        if content == "a":
            assert template.render([message]) == "ok"
        else:
            with pytest.raises(ValueError, match="chat template failed"):
                template.render([message])


def test_the_process_ends_with_its_template():
    import gc

    template = ChatTemplate("ok", {})
    child = template._process._child
    assert child is not None
    assert child.poll() is None
    del template
    gc.collect()
    assert child.poll() is not None


def test_threads_take_turns(folder):
    template = ChatTemplate.load(folder(chat_template="{{ messages[0].content }}"))
    texts = [str(i) * 1000 for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        messages = [[{"role": "user", "content": text}] for text in texts]
        assert list(pool.map(template.render, messages)) == texts


def test_a_devices_bytes_are_no_template(folder, tmp_path):
    """/dev/zero was read until the memory ended."""
    with pytest.raises(ValueError, match="not a file"):
        ChatTemplate.load(folder(), Path("/dev/zero"))
    (tmp_path / "big.jinja").write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        ChatTemplate.load(folder(), tmp_path / "big.jinja")


def test_half_a_character_is_not_text(folder):
    with pytest.raises(ValueError, match="not UTF-8: character 2 is U\\+D800"):
        render(folder, '{{ "ab\ud800" }}')
    with pytest.raises(ValueError, match="not UTF-8"):
        render(folder, "{{ messages[0].content }}", [{"role": "user", "content": "\udcff"}])


# what messages may hold

PARTS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}S{{ m.content }}{% else %}"
    "{% for p in m.content %}P{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)


def test_a_template_that_walks_parts_gets_parts(folder):
    """The message was gone without a word."""
    messages = [{"role": "user", "content": "bake bread"}]
    assert render(folder, PARTS, messages) == f"{BOS}[user] bake bread"
    parts = [{"type": "text", "text": "bake "}, {"type": "text", "text": "bread"}]
    assert render(folder, PARTS, [{"role": "user", "content": parts}]) == f"{BOS}[user] bake bread"
    assert render(folder, EITHER, messages) == "Sbake bread"


def test_a_template_that_writes_strings_gets_strings(folder):
    parts = [{"type": "text", "text": "bake"}, {"type": "text", "text": "bread"}]
    text = render(folder, "{{ messages[0].content }}", [{"role": "user", "content": parts}])
    assert text == "bake\nbread"


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": "x"}, {"type": "text"}, "a"])
def test_parts_that_are_not_text_are_refused(folder, part):
    with pytest.raises(ValueError, match="parts are text"):
        render(folder, PARTS, [{"role": "user", "content": [part]}])


def test_what_is_null_is_left_out_as_in_transformers(folder):
    messages = [{"role": "user", "content": "a", "tool_calls": None}]
    assert render(folder, "{{ messages[0] | tojson }}", messages) == (
        '{"role": "user", "content": "a"}'
    )


def test_tools_and_documents_reach_the_template(library, folder):
    import transformers

    source = (
        "{% if tools is not none %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
        "{% if documents %}{{ documents[0].title }}{% endif %}{{ messages[0].content }}"
    )
    tool = {"type": "function", "function": {"name": "é", "parameters": {"type": "object"}}}
    documents = [{"title": "T", "text": "x"}]
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=library, chat_template=source)
    for extra in ({}, {"tools": [tool]}, {"documents": documents, "tools": [tool, tool]}):
        expected = reference.apply_chat_template(CONVERSATION, tokenize=False, **extra)
        assert render(folder, source, **extra) == expected
    with pytest.raises(ValueError, match="must be JSON values"):
        render(folder, source, tools=[object()])


def test_names_of_another_type_are_no_names(folder):
    with pytest.raises(ValueError, match="none named default"):
        render(folder, [{"name": ["a"], "template": "x"}])


def test_the_date_is_available(folder):
    assert len(render(folder, "{{ strftime_now('%Y-%m-%d') }}")) == 10
