"""Tokenizers: reversible, complete offsets, exact chat formats, end-of-text tokens."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_jax.data import chat_template, tokenizer
from igpo_jax.errors import UserError
from tests import tiny_tokenizer
from tests.paths import REPO, shared_path

TRACE = "Janet sells 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = $18.\n#### 18"
LINES = [
  f"{name} sells {a} {thing} and {b} more, which makes {a + b} {thing} in the {day}."
  for name in ("Janet", "Toulouse", "Wendi")
  for thing in ("eggs", "boxes", "glasses")
  for day in ("morning", "evening")
  for a in range(5)
  for b in range(5)
]
USER = [{"role": "user", "content": "How many eggs?"}]
LLADA_USER = (
  "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHow many eggs?<|eot_id|>"
  "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.fixture(scope="module")
def pieces():
  return tokenizer.train_sentencepiece(LINES, 304)


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
  return tokenizer.load_tokenizer(tiny_tokenizer.make_directory(tmp_path_factory.mktemp("llada")))


@pytest.fixture(scope="module")
def every(pieces, llada):
  alphabet = "".join(sorted(set(TRACE + "How many eggs?")))
  return {"char": tokenizer.CharTokenizer(alphabet), "sentencepiece": pieces, "hf": llada}


KINDS = ("char", "sentencepiece", "hf")


@pytest.mark.parametrize("kind", KINDS)
def test_text_survives_encoding_and_decoding(every, kind):
  ids = every[kind].encode(TRACE)
  assert every[kind].decode(ids) == TRACE
  assert all(0 <= i < every[kind].vocab_size for i in ids)
  assert not every[kind].special_ids & set(ids)


@pytest.mark.parametrize("kind", ("sentencepiece", "hf"))
@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_and_every_character_is_covered(every, kind, text):
  text = text.encode("utf-8", "ignore").decode()  # lone surrogates are no text
  ids, offsets = every[kind].encode_with_offsets(text)
  assert ids == every[kind].encode(text)
  if "\0" not in text and "\u2581" not in text:  # SentencePiece's own marks
    assert every[kind].decode(ids) == text
  covered = {k for start, end in offsets for k in range(start, end)}
  assert covered == set(range(len(text)))
  assert all(start < end for start, end in offsets)
  assert [s for s, _ in offsets] == sorted(s for s, _ in offsets)


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_point_at_the_text_of_their_token(every, kind):
  ids, offsets = every[kind].encode_with_offsets(TRACE)
  for i, (start, end) in zip(ids, offsets, strict=True):
    assert every[kind].decode([i]) == TRACE[start:end]


@pytest.mark.parametrize("kind", ("sentencepiece", "hf"))
def test_all_bytes_of_one_letter_cover_that_letter(every, kind):
  ids, offsets = every[kind].encode_with_offsets("a🙂")
  assert len(ids) >= 3
  assert offsets[0] == (0, 1)
  assert set(offsets[1:]) == {(1, 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_text_token_by_token(every, kind):
  t = every[kind]
  text = TRACE if kind == "char" else f"🙂{TRACE} naïve 🙂🙂"
  ids = [*t.encode(text), t.eos_id, *t.encode("eggs"), t.mask_id, t.vocab_size + 9]
  pieces = t.pieces(ids)
  assert len(pieces) == len(ids) and "".join(pieces).startswith(text)
  named = [pieces[k] for k, i in enumerate(ids) if i in t.special_ids or i >= t.vocab_size]
  assert len(named) == 3 and all(name.startswith("<") for name in named)
  assert "".join(p for p in pieces if p not in named) == t.decode(ids, stop=False)
  # What is cut in the middle of a character is shown as broken, and nothing is lost.
  assert len(t.pieces(t.encode(text)[:-1])) == len(t.encode(text)) - 1
  assert "".join(t.pieces(t.encode(text)[:-1])) == t.decode(t.encode(text)[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_stops_at_the_first_stop_id(every, kind):
  t = every[kind]
  a, b = t.encode("eggs"), t.encode("How")
  for stop in t.stop_ids:
    assert t.decode([*a, stop, *b]) == "eggs"
    assert t.decode([*a, stop, *b], stop=False) == "eggsHow"
  assert t.decode([t.mask_id, *a, t.pad_id, t.vocab_size + 99, -1], stop=False) == "eggs"


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_are_in_the_vocabulary_and_told_apart(every, kind):
  t = every[kind]
  assert t.stop_ids[0] == t.eos_id
  assert t.turn_id in t.stop_ids
  assert t.mask_id not in t.stop_ids and t.mask_id != t.pad_id
  assert {t.mask_id, t.pad_id, *t.stop_ids} <= t.special_ids
  assert all(0 <= i < t.vocab_size for i in t.special_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_loads_as_the_same(every, kind, tmp_path):
  t = every[kind]
  assert not tokenizer.has_tokenizer(tmp_path)
  t.save(tmp_path)
  assert tokenizer.has_tokenizer(tmp_path)
  again = tokenizer.load_tokenizer(tmp_path)
  assert type(again) is type(t)
  assert again.encode_prompt(USER) == t.encode_prompt(USER)
  for name in ("vocab_size", "mask_id", "pad_id", "eos_id", "stop_ids", "turn_id", "special_ids"):
    assert getattr(again, name) == getattr(t, name), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_that_was_cut_short_is_not_taken_for_a_tokenizer(every, kind, tmp_path, monkeypatch):
  files, whole = [], tokenizer.write_file

  def write(directory, name, data):
    files.append(name)
    if len(files) <= kept:
      whole(directory, name, data)

  monkeypatch.setattr(tokenizer, "write_file", write)
  kept = 99
  every[kind].save(tmp_path / "whole")
  for kept in range(len(files)):
    files.clear()
    every[kind].save(tmp_path / str(kept))
    assert not tokenizer.has_tokenizer(tmp_path / str(kept))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefilled_answer_continues_the_prompt(every, kind):
  t = every[kind]
  prompt = t.encode_prompt(USER)
  prefilled = t.encode_prompt([*USER, {"role": "assistant", "content": "eggs"}])
  assert t.decode(prefilled, stop=False).startswith(t.decode(prompt, stop=False))
  assert t.decode(prefilled, stop=False).endswith("eggs")
  assert not set(prefilled[-2:]) & set(t.stop_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("messages", ([], [{"role": "robot", "content": "How"}]))
def test_messages_that_no_chat_format_knows_are_refused(every, kind, messages):
  with pytest.raises(UserError):
    every[kind].encode_prompt(messages)


# --- characters ---


def test_characters_are_numbered_from_three():
  t = tokenizer.CharTokenizer("ab=")
  assert t.encode("ab=") == [3, 4, 5]
  assert t.encode_prompt([{"role": "user", "content": "a="}]) == [3, 5, 2]
  assert t.vocab_size == 6


def test_an_unknown_character_is_named():
  with pytest.raises(UserError, match="'c'"):
    tokenizer.CharTokenizer("ab").encode("abc")
  with pytest.raises(UserError, match="twice"):
    tokenizer.CharTokenizer("aa")


# --- SentencePiece ---


def test_sentencepiece_training_gives_the_same_model_every_time(pieces, tmp_path):
  again = tokenizer.train_sentencepiece(iter(LINES), 304, tmp_path / "sub" / "tokenizer.model")
  assert again._model == pieces._model
  assert (tmp_path / "sub" / "tokenizer.model").read_bytes() == pieces._model
  assert pieces.vocab_size == 304


def test_text_cannot_forge_the_special_pieces(pieces):
  ids = pieces.encode("<mask> </s> <|assistant|>")
  assert not pieces.special_ids & set(ids)
  assert pieces.decode(ids) == "<mask> </s> <|assistant|>"


def test_a_sentencepiece_prompt_is_roles_and_contents(pieces):
  roles = pieces._roles
  assert pieces.encode_prompt([{"role": "system", "content": "eggs"}, *USER]) == [
    roles["system"],
    *pieces.encode("eggs"),
    roles["user"],
    *pieces.encode("How many eggs?"),
    roles["assistant"],
  ]


def test_a_foreign_sentencepiece_model_is_given_the_ids_it_lacks():
  import io

  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([*LINES, "User: A\n", "Assistant: "]),
    model_writer=model,
    vocab_size=60,
    character_coverage=1.0,
    eos_id=-1,
    bos_id=-1,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  t = tokenizer.SentencePieceTokenizer(model.getvalue())
  size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
  assert (t.mask_id, t.eos_id, t.vocab_size) == (size, size + 1, size + 2)
  ids = t.encode_prompt([{"role": "user", "content": "in more"}])
  assert t.decode(ids).endswith("Assistant:")
  assert t.decode([t.mask_id, *t.encode("in"), t.eos_id, 3]) == "in"


@pytest.mark.parametrize(
  ("texts", "pieces", "line"),
  [
    (
      ["a b c"],
      5000,
      r"5000 pieces .* of 1 line\(s\) of text: .* no more than 267 .* at most that",
    ),
    (["a b c"], 12, r"12 pieces .* characters of the text take 267: ask for at least that many"),
    (["a b c"], 1, r"1 pieces .* characters of the text take 267: ask for at least that many"),
    ([], 300, "there is no text"),
    (["", "\n"], 300, "there is no text"),
  ],
)
def test_a_vocabulary_that_the_texts_cannot_have_is_one_line_about_what_can_be_asked_for(
  texts, pieces, line
):
  with pytest.raises(UserError, match=f"^config: X: {line}") as error:
    tokenizer.train_sentencepiece(texts, pieces, what="config: X: ")
  assert "--" not in str(error.value) and "\n" not in str(error.value)
  for number in re.findall(r"take (\d+)|than (\d+)", str(error.value)):
    tokenizer.train_sentencepiece(texts, int("".join(number)))  # what the line says is so


def test_sentencepiece_on_real_traces_is_reversible():
  with shared_path("data", "gsm8k", "train.jsonl").open() as file:
    texts = [json.loads(next(file))["answer"] for _ in range(300)]
  t = tokenizer.train_sentencepiece(texts, 512)
  assert all(t.decode(t.encode(text)) == text for text in texts)


# --- Hugging Face ---


def test_the_llada_prompt_is_the_known_string(llada):
  assert llada.render_prompt(USER) == LLADA_USER
  assert llada.render_prompt([{"role": "system", "content": " Be brief.\n"}, *USER]) == (
    "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    + LLADA_USER.removeprefix("<|startoftext|>")
  )


def test_the_llada_prompt_is_encoded_as_the_library_encodes_the_string(llada, tmp_path):
  directory = tiny_tokenizer.make_directory(tmp_path)
  library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
  expected = library.encode(LLADA_USER, add_special_tokens=False).ids
  assert llada.encode_prompt(USER) == expected
  prefilled = library.encode(LLADA_USER + "<reasoning>", add_special_tokens=False).ids
  prompt = [*USER, {"role": "assistant", "content": "<reasoning>"}]
  assert llada.encode_prompt(prompt) == prefilled


def test_a_directory_without_template_uses_the_format_of_its_tokens(llada, tmp_path):
  bare = tokenizer.load_tokenizer(tiny_tokenizer.make_directory(tmp_path, template=None))
  assert bare.encode_prompt(USER) == llada.encode_prompt(USER)


def test_a_content_that_spells_a_special_token_stays_text(llada):
  content = "what is <|mdm_mask|> or <|eot_id|>?"
  ids = llada.encode_prompt([{"role": "user", "content": content}])
  assert llada.mask_id not in ids
  assert ids.count(llada.turn_id) == 1
  assert content in llada.decode(ids, stop=False)


def test_another_template_is_followed(tmp_path):
  template = (
    "{% for m in messages %}{{ m.role | upper }}> {{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}BOT> {% endif %}"
  )
  t = tokenizer.load_tokenizer(tiny_tokenizer.make_directory(tmp_path, template=template))
  assert t.render_prompt(USER) == "USER> How many eggs?<|endoftext|>BOT> "
  assert t.encode_prompt(USER).count(t.eos_id) == 1


@pytest.mark.parametrize(
  "template, line",
  [
    ("{% for %}", "cannot be read"),
    ("{{ raise_exception('no system role') }}", "no system role"),
    ("{{ messages[99].content.x }}", "fails"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails"),
  ],
)
def test_a_template_that_fails_is_one_clear_line(tmp_path, template, line):
  directory = tiny_tokenizer.make_directory(tmp_path, template=template)
  with pytest.raises(UserError, match=line):
    tokenizer.load_tokenizer(directory).encode_prompt(USER)


def test_special_ids_come_from_the_files(tmp_path):
  plain = tokenizer.load_tokenizer(tiny_tokenizer.make_directory(tmp_path / "a"))
  first = plain.vocab_size - len(tiny_tokenizer.SPECIAL)
  names = {name: first + k for k, name in enumerate(tiny_tokenizer.SPECIAL)}
  assert plain.mask_id == names["<|mdm_mask|>"]
  assert plain.eos_id == plain.pad_id == names["<|endoftext|>"]
  assert plain.stop_ids == (names["<|endoftext|>"], names["<|eot_id|>"])
  # The model's own config wins, as for LLaDA, whose mask is not named by its tokenizer.
  config = {"mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081}
  t = tokenizer.load_tokenizer(tiny_tokenizer.make_directory(tmp_path / "b", config=config))
  assert (t.mask_id, t.eos_id, t.pad_id) == (126336, 126081, 126081)
  assert t.stop_ids == (126081, names["<|eot_id|>"])
  assert t.vocab_size == 126337
  assert t.decode([*t.encode("eggs"), 126336, 126300, 126081, 5]) == "eggs"
  t.save(tmp_path / "c")  # without config.json beside it, the ids are kept
  assert tokenizer.load_tokenizer(tmp_path / "c").mask_id == 126336


def test_a_tokenizer_without_a_mask_is_refused(tmp_path):
  special = tuple(s for s in tiny_tokenizer.SPECIAL if s != "<|mdm_mask|>")
  directory = tiny_tokenizer.make_directory(tmp_path, special=special)
  with pytest.raises(UserError, match="no mask token"):
    tokenizer.load_tokenizer(directory)


def bare_directory(path, **files):
  """A directory whose tokenizer.json ends with <|endoftext|>; further files by their stems."""
  directory = tiny_tokenizer.make_directory(path, template=None, special=("<|endoftext|>",))
  files["tokenizer_config"] = {"eos_token": "<|endoftext|>"} | files.get("tokenizer_config", {})
  for name, value in files.items():
    (directory / f"{name}.json").write_text(json.dumps(value))
  last = len(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()) - 1
  return directory, last


def added(text, special=True, **flags):
  return {"content": text, "special": special, **flags}


@pytest.mark.parametrize(
  "files, mask",
  [
    # The ids that the files give, gaps and all.
    ({"tokenizer_config": {"mask_token": "<m>", "added_tokens_decoder": {"{5}": added("<m>")}}}, 5),
    ({"tokenizer_config": {"mask_token": added("<m>")}, "added_tokens": {"<m>": "{3}"}}, 3),
    ({"tokenizer_config": {"added_tokens_decoder": {"{5}": added("<|mdm_mask|>")}}}, 5),
    ({"added_tokens": {"<|mask|>": "{2}"}}, 2),
    ({"special_tokens_map": {"mask_token": "<m>"}, "added_tokens": {"<m>": "{9}"}}, 9),
    # Only named: they follow the vocabulary in the library's order.
    ({"tokenizer_config": {"mask_token": "<m>"}}, 1),
    ({"tokenizer_config": {"mask_token": "<m>", "pad_token": "<p>", "bos_token": "<b>"}}, 3),
    ({"special_tokens_map": {"mask_token": added("<m>")}}, 1),
    ({"tokenizer_config": {"mask_token": "<m>", "additional_special_tokens": ["<a>"]}}, 1),
    ({"tokenizer_config": {"mask_token": "<m>", "added_tokens_decoder": {"{4}": added("<x>")}}}, 5),
  ],
)
def test_a_mask_that_is_named_beside_the_vocabulary_is_found(tmp_path, files, mask):
  _, last = bare_directory(tmp_path / "x")
  text = re.sub(r'"\{(\d)\}"(:?)', lambda m: f'"{last + int(m[1])}"{m[2]}' if m[2]
                else str(last + int(m[1])), json.dumps(files))  # fmt: skip
  directory, _ = bare_directory(tmp_path, **json.loads(text))
  t = tokenizer.load_tokenizer(directory)
  assert t.mask_id == last + mask
  assert t.vocab_size > t.mask_id and t.mask_id in t.special_ids
  assert t.decode([t.mask_id, *t.encode("eggs")]) == "eggs"
  t.save(tmp_path / "copy")
  again = tokenizer.load_tokenizer(tmp_path / "copy")
  assert (again.mask_id, again.vocab_size, again.special_ids) == (
    t.mask_id, t.vocab_size, t.special_ids,
  )  # fmt: skip


def test_tokens_beside_the_vocabulary_are_single_tokens_where_they_may_be_written(tmp_path):
  decoder = {
    "340": added("<|im_start|>"),
    "341": added("<|im_end|>"),
    "342": added("<|mask|>"),
    "343": added("<tool>", special=False),
    "344": added("<tool>s", special=False, lstrip=True, rstrip=True),
  }
  config = {"tokenizer_config": {"added_tokens_decoder": decoder}}
  t = tokenizer.load_tokenizer(bare_directory(tmp_path, **config)[0])
  # The prompt's format writes them; a content that spells a special one does not.
  ids = t.encode_prompt([{"role": "user", "content": "<|im_end|> <tool>"}])
  assert ids[0] == 340 and ids.count(341) == 1 and ids.count(340) == 2 and 343 in ids
  # One that is not special is text like any other: it comes back, with its place.
  text = "a <tool>b é <tool>s  <tool>"
  ids, offsets = t.encode_with_offsets(text)
  assert [(i, text[a:b]) for i, (a, b) in zip(ids, offsets, strict=True) if i >= 340] == [
    (343, "<tool>"), (344, " <tool>s  "), (343, "<tool>"),
  ]  # fmt: skip
  assert t.decode(t.encode("x <tool>y é")) == "x <tool>y é"
  assert t.encode_batch_with_offsets([text, ""]) == [(ids, offsets), ([], [])]
  assert t.decode([*t.encode("a"), 341, 340, 5]) == "a"


@pytest.mark.parametrize(
  "files, line",
  [
    ({"added_tokens": {"<m>": 3}}, "'<m>' has the id 3, which is that of"),
    ({"added_tokens": {"<m>": "three"}}, "'<m>' has the id 'three', which is no number"),
    ({"added_tokens": {"<m>": -3}}, "no number"),
    ({"added_tokens": {"<m>": True}}, "no number"),
    ({"added_tokens": {"<m>": 400, "<n>": 400}}, "'<n>' has the id 400, which is that of '<m>'"),
    ({"added_tokens": ["<m>"]}, "a JSON object was expected, not list"),
    ({"config": {"mask_token_id": "five"}}, "config.json: mask_token_id='five' should be a whole"),
    ({"config": {"mask_token_id": 1.5}}, "mask_token_id=1.5 should be a whole number"),
    ({"config": {"mask_token_id": True}}, "mask_token_id=True should be"),
    ({"config": {"mask_token_id": 7, "eos_token_id": ["a"]}}, "eos_token_id=.* should be a whole"),
    ({"config": {"mask_token_id": 7}, "generation_config": {"eos_token_id": {}}}, "eos_token_id"),
  ],
)
def test_an_id_that_cannot_be_is_one_clear_line(tmp_path, files, line):
  with pytest.raises(UserError, match=line):
    tokenizer.load_tokenizer(bare_directory(tmp_path, **files)[0])


@pytest.mark.parametrize(
  "files, stops",
  [
    ({"config": {"eos_token_id": [5, 6, 7]}}, (5, 6, 7)),
    ({"config": {"eos_token_id": [5, 6, 5]}}, (5, 6)),
    ({"config": {"eos_token_id": 5}}, (5,)),
    ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": [5, 8, 9]}}, (5, 8, 9)),
    ({"config": {"eos_token_id": [5, 6]}, "generation_config": {"eos_token_id": 9}}, (5, 6, 9)),
    ({"config": {"eos_token_id": [5, 6], "eot_token_id": 9}}, (5, 6, 9)),
    ({"igpo_tokenizer": {"eos_token_id": [5, 6]}, "config": {"eos_token_id": 9}}, (5, 6)),
    ({"config": {"eos_token_id": None}}, ()),
    ({"config": {"eos_token_id": []}}, ()),
    ({"config": {"eos_token_id": -1}}, ()),
  ],
)
def test_every_end_of_text_ends_an_answer(tmp_path, files, stops):
  files.setdefault("config", {})["mask_token_id"] = 300
  directory, last = bare_directory(tmp_path / "a", **files)
  t = tokenizer.load_tokenizer(directory)
  stops = stops or (last,)  # <|endoftext|>, by its name
  assert t.stop_ids == stops and t.eos_id == t.pad_id == stops[0]
  assert set(stops) <= t.special_ids
  for stop in stops:
    assert t.decode([100, stop, 101]) == t.decode([100])
  t.save(tmp_path / "b")  # without the files that told
  again = tokenizer.load_tokenizer(tmp_path / "b")
  assert (again.stop_ids, again.turn_id, again.pad_id) == (stops, t.turn_id, t.pad_id)


def test_a_pad_id_below_zero_is_none(tmp_path):
  directory, last = bare_directory(tmp_path, config={"mask_token_id": 300, "pad_token_id": -1})
  assert tokenizer.load_tokenizer(directory).pad_id == last


@pytest.mark.parametrize("kind", ("sentencepiece", "hf"))
@pytest.mark.parametrize("text", ["\ud83d", "a\ud800b", "\udfff\udfff end", "ok \ude00"])
def test_half_a_character_is_encoded_as_a_broken_one(every, kind, text):
  t = every[kind]
  ids, offsets = t.encode_with_offsets(text)
  assert t.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  assert {k for start, end in offsets for k in range(start, end)} == set(range(len(text)))
  assert t.encode_batch_with_offsets([text]) == [(ids, offsets)]
  prompt = t.encode_prompt([{"role": "user", "content": text}])
  assert prompt == t.encode_prompt([{"role": "user", "content": t.decode(ids)}])


def test_blanks_before_a_word_belong_to_its_token(tmp_path):
  """Whatever the file says about trimmed offsets: a token that begins early is known to."""
  for trim in (True, False):
    directory = tiny_tokenizer.make_directory(tmp_path / str(trim), trim_offsets=trim)
    _, offsets = tokenizer.load_tokenizer(directory).encode_with_offsets("She sells eggs.")
    assert any(start == len("She") for start, _ in offsets)


def test_a_batch_is_encoded_as_its_texts(llada):
  texts = [TRACE, "", "a🙂", "She <|eot_id|>"]
  assert llada.encode_batch_with_offsets(texts) == [llada.encode_with_offsets(t) for t in texts]


def test_a_template_file_of_its_own_is_read(tmp_path):
  directory = tiny_tokenizer.make_directory(tmp_path, template=None)
  (directory / "chat_template.jinja").write_text("{{ messages[0].content }}!")
  assert tokenizer.load_tokenizer(directory).render_prompt(USER) == "How many eggs?!"


def test_chatml_is_recognised_by_its_tokens(tmp_path):
  special = ("<|endoftext|>", "<|mask|>", "<|im_start|>", "<|im_end|>")
  directory = tiny_tokenizer.make_directory(tmp_path, template=None, special=special)
  t = tokenizer.load_tokenizer(directory)
  assert t._chat is chat_template.chatml_chat
  assert t.render_prompt(USER) == (
    "<|im_start|>user\nHow many eggs?<|im_end|>\n<|im_start|>assistant\n"
  )
  assert t.decode([*t.encode("eggs"), t.turn_id, *t.encode("How")]) == "eggs"


def bpe_directory(path, name, added=(), **settings):
  """A directory with vocab.json and merges.txt in place of tokenizer.json."""
  text = (tiny_tokenizer.make_directory(path) / "tokenizer.json").read_text()
  model = json.loads(text)["model"]
  ids = {**model["vocab"], "12": 400, "1's": 401}  # tokens that digits and words forbid
  plain = {token: id for token, id in ids.items() if token not in tiny_tokenizer.SPECIAL}
  (path / "vocab.json").write_text(json.dumps(plain))
  merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), "1 2", ""]
  (path / "merges.txt").write_text("\n".join(merges))
  decoder = {str(410 + n): {"content": token, "special": True} for n, token in enumerate(added)}
  config = {"tokenizer_class": name, "eos_token": "<|endoftext|>", "added_tokens_decoder": decoder}
  (path / "tokenizer_config.json").write_text(json.dumps(config | settings))
  (path / "tokenizer.json").unlink()
  return path


DREAM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")


def test_a_vocabulary_and_its_merges_are_as_good_as_a_tokenizer_file(tmp_path):
  whole = tokenizer.load_tokenizer(tiny_tokenizer.make_directory(tmp_path / "whole"))
  directory = bpe_directory(tmp_path / "parts", "GPT2Tokenizer", DREAM)
  assert tokenizer.has_tokenizer(directory)
  parts = tokenizer.load_tokenizer(directory)
  text = TRACE.replace("12", "")
  assert parts.encode_with_offsets(text) == whole.encode_with_offsets(text)
  assert parts.encode("12") == [400]

  dream = tokenizer.load_tokenizer(bpe_directory(tmp_path / "dream", "DreamTokenizer", DREAM))
  assert dream.encode("12") == [*dream.encode("1"), *dream.encode("2")]
  assert dream.encode("e\u0301") == dream.encode("\u00e9")
  assert (dream.eos_id, dream.turn_id, dream.mask_id) == (410, 412, 414)
  dream.save(tmp_path / "saved")
  again = tokenizer.load_tokenizer(tmp_path / "saved")
  for one in (dream, again):
    assert one.decode(one.encode(TRACE)) == TRACE
    # Without a chat template nobody knows which system message the model was trained with.
    assert one.render_prompt(USER) == (
      "<|im_start|>user\nHow many eggs?<|im_end|>\n<|im_start|>assistant\n"
    )
  mine = [{"role": "system", "content": "Be brief."}, *USER]
  assert dream.render_prompt(mine).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
  assert dream.encode_prompt(USER)[0] == again.encode_prompt(USER)[0] == 411


def test_a_vocabulary_that_cannot_be_read_as_its_own_code_does_is_one_clear_line(tmp_path):
  directory = bpe_directory(tmp_path, "OtherTokenizer", DREAM)
  with pytest.raises(UserError, match=r"tokenizer_class='OtherTokenizer' in .*; known: Dream"):
    tokenizer.load_tokenizer(directory)
  directory = bpe_directory(tmp_path, "Qwen2Tokenizer", DREAM)
  for merges, line in (("1 2\n1 nope\n", "line 2, '1 nope'"), ("12\n", "line 1, '12'")):
    (directory / "merges.txt").write_text(merges)
    with pytest.raises(UserError, match=line):
      tokenizer.load_tokenizer(directory)
  (directory / "vocab.json").write_text('{"a": "b"}')
  with pytest.raises(UserError, match="'a' has the id \"b\""):
    tokenizer.load_tokenizer(directory)


# --- files ---


@pytest.mark.parametrize(
  "name, text, line",
  [
    ("nothing.txt", "x", "no tokenizer in"),
    ("tokenizer.json", "{", "cannot read"),
    ("tokenizer.json", "\udcff", "cannot read"),
    ("tokenizer.json", '{"model": {"type": "nope"}}', "cannot read"),
    ("x.model", "not a model", "SentencePiece"),
    ("igpo_tokenizer.json", "{", "not JSON"),
    ("igpo_tokenizer.json", "[]", "JSON object"),
    ("igpo_tokenizer.json", '{"type": "char"}', "alphabet"),
  ],
)
def test_a_broken_tokenizer_file_is_one_clear_line(tmp_path, name, text, line):
  (tmp_path / name).write_text(text, errors="surrogateescape")
  with pytest.raises(UserError, match=line):
    tokenizer.load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_one_clear_line(tmp_path):
  with pytest.raises(UserError, match="no such file"):
    tokenizer.load_tokenizer(tmp_path / "nowhere")
  assert not tokenizer.has_tokenizer(tmp_path / "nowhere")


def test_reading_data_does_not_import_jax():
  code = (
    "import sys; import igpo_jax.data.tokenizer, igpo_jax.data.hf_tokenizer,"
    " igpo_jax.data.sources, igpo_jax.data.pipeline, igpo_jax.data.builders;"
    " sys.exit('jax' in sys.modules or 'tensorflow' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
