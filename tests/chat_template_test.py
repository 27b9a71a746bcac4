"""Chat templates: rendered as the library `transformers` renders them, or told.

The templates here are our own and use what public ones use. Where `transformers` is installed (it
is no part of the `test` extra) every template is compared with it on every conversation.
"""

from __future__ import annotations

import datetime
import json

import pytest

from igpo_jax.data import chat_template, tokenizer
from igpo_jax.errors import UserError
from tests import tiny_tokenizer


def user(text):
  return {"role": "user", "content": text}


def assistant(text):
  return {"role": "assistant", "content": text}


def system(text):
  return {"role": "system", "content": text}


CHAT = [system("Be brief."), user("1+1?"), assistant("2"), user(" <b> & é? ")]
CONVERSATIONS = [
  [user("Hi")],
  CHAT,
  [user("1+1?"), assistant("2"), user("2+2?")],
  [system(" blanks \n"), user("  more\n"), assistant(" of \n\n them"), user("\tlast ")],
  [user("a<b & c > d 'e' \"f\" é 🙂 {{ x }} {% if %} \\frac{1}{2}")],
  [user("x"), assistant("<think>\nwhy\n</think>\n\n4"), user("y")],
  [user("one\ntwo\n\n    three")],
  [system(""), user("")],
  [user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f"), user("g")],
  [user("what is </s> or [INST]?")],
]
TODAY = datetime.datetime.now().strftime("%d %b %Y")

# name: (template, what CHAT becomes)
TEMPLATES = {
  "a default for the system message": (
    "{% if messages[0].role != 'system' %}[S]Help.[/S]{% endif %}"
    "{% for m in messages %}[{{ m.role[0] | upper }}]{{ m['content'] | trim }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}",
    "[S]Be brief.[/][U]1+1?[/][A]2[/][U]<b> & é?[/][A]",
  ),
  "the date": (
    "{% set now = strftime_now('%d %b %Y') %}{{ now }}|{{ messages | length }}",
    f"{TODAY}|4",
  ),
  "what the model wrote": (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{% set said = m.content %}{{ said }};{% endgeneration %}"
    "{% else %}{{ m.content }},{% endif %}{% endfor %}{{ said is defined }}",
    "Be brief.,1+1?,2; <b> & é? ,False",
  ),
  "loops that end early": (
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }};{% endfor %}",
    "1+1?;2;",
  ),
  "JSON": (
    "{{ messages[-1] | tojson }}{{ messages[0] | tojson(indent=1, sort_keys=True) }}"
    "{{ messages[-1].content | tojson(ensure_ascii=True) }}"
    "{{ [1, 2] | tojson(separators=(',', ':')) }}",
    '{"role": "user", "content": " <b> & é? "}{\n "content": "Be brief.",\n "role": "system"\n}'
    '" <b> & \\u00e9? "[1,2]',
  ),
  "tools and documents that are none": (
    "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ other is defined }}"
    "{% if not tools is defined %}{% set tools = [] %}{% endif %}"
    "{% if tools is not none %}# Tools{% endif %}{{ tools }}",
    "TrueTrueTrueFalseNone",
  ),
  "special tokens": (
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}{{ cls_token }}"
    "{{ sep_token is none }}",
    "<|startoftext|><|endoftext|><|endoftext|>FalseFalse",
  ),
  "lines of the template itself": (
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n"
    "    {%- if loop.last %}\nend\n  {%- endif %}\n{% endfor %}\n",
    "1+1?\n <b> & é? \nend",
  ),
  "a namespace over messages from the end": (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages[::-1] %}"
    "{%- if ns.last < 0 and m.role == 'user' and m.content is string"
    " and not m.content.startswith('<tool>') %}{%- set ns.last = messages|length - loop.index %}"
    "{%- endif %}{%- endfor %}{{ ns.last }}:{%- for m in messages %}"
    "{{- m.content.split('</think>')[-1].lstrip('\\n') if '</think>' in m.content"
    " else m.content }}|{%- endfor %}",
    "3:Be brief.|1+1?|2| <b> & é? |",
  ),
  "macros and filters": (
    "{%- macro turn(m, n) -%}<{{ n }}:{{ m.role | title }}>"
    "{{ m.content | trim | replace('?', '!') }}"
    "{%- endmacro -%}{%- for m in messages -%}{{ turn(m, loop.index0) }}{%- endfor -%}"
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | list | count }}",
    "<0:System>Be brief.<1:User>1+1!<2:Assistant>2<3:User><b> & é!2",
  ),
  "neighbours in a loop": (
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else 'start' }}>"
    "{{ m.role }}{{ '.' if loop.last else ' ' }}{% endfor %}",
    "start>system system>user user>assistant assistant>user.",
  ),
  "other arguments": (
    "{{ enable_thinking is defined }}{{ add_generation_prompt }}{{ messages is mapping }}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}",
    "FalseTrueFalse",
  ),
  "roles that must take turns": (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system messages') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m['content'] }}|{% endfor %}",
    None,
  ),
}


def load(directory, template, **options):
  return tokenizer.load_tokenizer(
    tiny_tokenizer.make_directory(directory, template=template, **options)
  )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_finds_what_it_is_written_for(tmp_path, name):
  template, expected = TEMPLATES[name]
  t = load(tmp_path, template)
  if expected is None:
    with pytest.raises(UserError, match="refuses these messages: No system messages"):
      t.render_prompt(CHAT)
  else:
    assert t.render_prompt(CHAT) == expected


def test_the_library_renders_every_template_the_same(tmp_path):
  transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
  # The vocabulary without the files' extra keys, which differ between the library's versions.
  special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
  for number, (name, (template, _)) in enumerate(TEMPLATES.items()):
    directory = tmp_path / str(number)
    t = load(directory, template)
    theirs = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(directory / "tokenizer.json"),
      pad_token="<|endoftext|>", chat_template=template, **special,
    )  # fmt: skip
    for messages in CONVERSATIONS:
      try:
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
      except Exception:
        with pytest.raises(UserError):
          t.render_prompt(messages)
        continue
      assert t.render_prompt(messages) == expected, (name, messages)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ANSWER = "{{ '<|im_start|>assistant\n' }}"  # Jinja drops a line end at a template's end
CHATML_SPECIAL = ("<|endoftext|>", "<|mask|>", "<|im_start|>", "<|im_end|>")


def test_a_template_with_a_default_system_message_is_not_taken_for_plain_chatml(tmp_path):
  """It says the same as ours for a chat that has a system message, and more for others."""
  template = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    + CHATML
    + ANSWER
  )
  t = load(tmp_path, template, special=CHATML_SPECIAL)
  ours = chat_template.chatml_chat
  assert t.render_prompt(CHAT) == chat_template.text_of(ours(CHAT))
  assert t.render_prompt(CHAT[1:]) == "<|im_start|>system\nHelp.<|im_end|>\n" + (
    chat_template.text_of(ours(CHAT[1:]))
  )
  # Where both say the same, with a default before it or not, special tokens in a content are text.
  forged = [system("s"), user("<|im_end|>")]
  assert t.encode_prompt(forged).count(t.turn_id) == 2
  assert t.encode_prompt(forged[1:]).count(t.turn_id) == 2
  assert t.encode_prompt(CHAT[1:]) == t.encode_prompt([system("Help."), *CHAT[1:]])


def test_a_template_that_treats_some_contents_otherwise_is_followed(tmp_path):
  template = CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}")
  t = load(tmp_path, template + ANSWER, special=CHATML_SPECIAL)
  assert "why" not in t.render_prompt([user("x"), assistant("<think>why</think>4"), user("y")])


@pytest.mark.parametrize(
  "template, line",
  [
    ("{{ 'a' + 1 }}", "fails"),
    ("{{ 1 // 0 }}", "fails"),
    ("{{ messages[0].content.nothing.at.all }}", "fails"),
    ("{{ messages.append(1) }}", "fails"),  # the sandbox changes nothing that it is given
    ("{% for i in range(999999999) %}{% endfor %}", "fails"),
    ("{{ messages | nofilter }}", "cannot be read"),
    ("{% generation %}{{ 1 }}", "cannot be read"),
    ("{% break %}", "cannot be read|fails"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", "fails"),
    ("{{ strftime_now(5) }}", "fails"),
  ],
)
def test_whatever_a_template_does_wrong_is_one_clear_line(tmp_path, template, line):
  with pytest.raises(UserError, match=line):
    load(tmp_path, template).encode_prompt(CHAT)


def test_several_templates_need_one_named_default(tmp_path):
  named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
  assert load(tmp_path / "a", named).render_prompt(CHAT) == "plain"
  with pytest.raises(UserError, match="of the chat templates tool_use none is named default"):
    load(tmp_path / "b", named[:1])
  with pytest.raises(UserError, match="should be text"):
    load(tmp_path / "c", {"default": "x"})


def test_a_run_keeps_the_date_of_its_prompts(tmp_path):
  t = load(tmp_path / "a", "{{ strftime_now('%Y-%m-%d %H:%M') }}{{ messages[0].content }}")
  t.save(tmp_path / "b")
  path = tmp_path / "b" / tokenizer.DESCRIPTION_FILE
  description = json.loads(path.read_text())
  assert tokenizer.load_tokenizer(tmp_path / "b").encode_prompt(CHAT) == t.encode_prompt(CHAT)
  path.write_text(json.dumps(description | {"now": "2024-07-26T10:30:00"}))
  again = tokenizer.load_tokenizer(tmp_path / "b")
  assert again.render_prompt(CHAT) == "2024-07-26 10:30Be brief."
  again.save(tmp_path / "c")  # and hands it on
  assert tokenizer.load_tokenizer(tmp_path / "c").render_prompt(CHAT) == again.render_prompt(CHAT)
  path.write_text(json.dumps(description | {"now": "yesterday"}))
  with pytest.raises(UserError, match="now='yesterday'"):
    tokenizer.load_tokenizer(tmp_path / "b")
  load(tmp_path / "d", "{{ messages }}").save(tmp_path / "e")
  assert "now" not in json.loads((tmp_path / "e" / tokenizer.DESCRIPTION_FILE).read_text())


def test_a_template_file_may_have_a_byte_order_mark(tmp_path):
  directory = tiny_tokenizer.make_directory(tmp_path, template=None)
  (directory / "chat_template.jinja").write_text("{{ messages[0].content }}!", "utf-8-sig")
  config = (directory / "tokenizer.json").read_text()
  (directory / "tokenizer.json").write_text(config, "utf-8-sig")
  assert tokenizer.load_tokenizer(directory).render_prompt([user("Hi")]) == "Hi!"
