"""Records, formats, sources and batches: nothing lost in silence, the same for every host."""

from __future__ import annotations

import decimal
import gzip
import json
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_jax.config import load_config_file
from igpo_jax.data import formats, hub, pipeline, sources, spans, tokenizer, values
from igpo_jax.data.records import Record, read_messages
from igpo_jax.errors import UserError
from igpo_jax.rewards import answers
from tests import tiny_tokenizer
from tests.paths import REPO, shared_path

CHARS = tokenizer.CharTokenizer("0123456789+=# ;")


def make_records(n: int = 13, trace: str = "{k}+1;# {k}") -> list[Record]:
  """Records of prompts "k+k=" repeated to different lengths, the answer after "#"."""
  records = []
  for k in range(n):
    text = trace.replace("{k}", str(k))
    start = text.find("#")
    records.append(
      Record(
        id=f"r/{k}",
        prompt=({"role": "user", "content": "+".join([str(k)] * (1 + k % 4))},),
        trace=text,
        answer=str(k),
        answer_span=(start, len(text)) if start >= 0 else None,
      )
    )
  return records


def write_jsonl(path: pathlib.Path, rows) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return f"jsonl:{path}"


# --- where the answer is ---


@pytest.mark.parametrize(
  "trace, answer, stated",
  [
    ("2+3=5\n#### 5", "5", "#### 5"),
    ("a #### b\n#### 5", "5", "#### 5"),
    (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}", r"\boxed{\frac{1}{2}}."),
    (r"The final answer is \boxed{7}", "7", r"The final answer is \boxed{7}"),
    ("we get $\\boxed{7}$.\nThe answer is: 7", "7", "\\boxed{7}$.\nThe answer is: 7"),
    (r"\boxed{7} and, again, \boxed{ 7 }", "7", r"\boxed{7} and, again, \boxed{ 7 }"),
    (r"\boxed{3} is not it but \boxed{7}", "7", r"\boxed{7}"),
    ("the answer is found by adding\n2+5\n\\boxed{7}", "7", r"\boxed{7}"),
    ("<answer>\n\\boxed{7}\n</answer>", "7", "<answer>\n\\boxed{7}\n</answer>"),
    ("17 and 7.5 and 7 eggs", "7", "7 eggs"),
    (r"open \boxed{7", "8", None),
    (r"open \boxed{ and \boxed{7}", "7", r"\boxed{7}"),
    ("nothing at all", "8", None),
    ("", "8", None),
    # Whatever the grader would read as a statement of the answer, in any spelling of it.
    ("so $x=\\fbox{\\frac{1}{2}}$. Done.\nThe answer is: $\\frac{1}{2}$", "$\\frac{1}{2}$",
     "\\fbox{\\frac{1}{2}}$. Done.\nThe answer is: $\\frac{1}{2}$"),
    ("is $\\boxed 2$ then.\nThe answer is: 2", "2", "\\boxed 2$ then.\nThe answer is: 2"),
    ("so \\boxed{7\nThe answer is: 7", "7", "\\boxed{7\nThe answer is: 7"),  # never closes
    ("so \\boxed{0.5}.\nOr \\boxed{\\frac12}", "1/2", "\\boxed{0.5}.\nOr \\boxed{\\frac12}"),
    ("so \\boxed{\\sqrt 8}.\nOr \\boxed{2\\sqrt2}", "2\\sqrt2",
     "\\boxed{\\sqrt 8}.\nOr \\boxed{2\\sqrt2}"),  # nobody here can tell that it is another
    ("The answer is 36.\nCheck: 6*6.\n#### 36", "36", "The answer is 36.\nCheck: 6*6.\n#### 36"),
    ("the final answer is $36.00 then\nso\n#### 36", "36",
     "the final answer is $36.00 then\nso\n#### 36"),
    ("The answer is thirty-six.\n2+2\n#### 36", "36", "The answer is thirty-six.\n2+2\n#### 36"),
    ("#### 36\nor rather\n#### 36", "36", "#### 36\nor rather\n#### 36"),
    ("<answer>36</answer>\n<answer>36</answer>", "36", "<answer>36</answer>\n<answer>36</answer>"),
    ("Half is 18, so the answer is not 18.\n#### 36", "36", "#### 36"),
    ("#### Step 1\nadd\n#### 36", "36", "#### 36"),
    ("#### 1. Setup\nadd\n#### 36", "36", "#### 36"),
    ("to answer the question, add 36\nand 2\n\\boxed{38}", "38", "\\boxed{38}"),
    ("He has $448,000 left", "448000", "448,000 left"),
  ],
)  # fmt: skip
def test_the_answer_begins_where_it_is_first_stated(trace, answer, stated):
  span = spans.find_answer_span(trace, answer)
  assert (span and trace[slice(*span)]) == stated


@given(st.text(alphabet="\\boxed{} 7#", max_size=40))
@settings(max_examples=200, deadline=None)
def test_boxes_are_balanced_and_where_they_say(text):
  for start, end, content in spans.boxes(text):
    assert text[start:end].endswith("{" + content + "}")
    bare = re.sub(r"\\.", "", re.sub(r"\\f?boxed\s*\{", "{", content))
    assert bare.count("{") == bare.count("}")


def test_boxes_nested_ten_thousand_deep_take_no_time():
  text = r"\boxed{" * 10_000 + "7" + "}" * 10_000
  assert [box[:2] for box in spans.boxes(text)] == [(0, len(text))]


@pytest.mark.parametrize(
  "offsets, span, expected",
  [
    ([(0, 3), (3, 5), (5, 6)], (3, 6), (1, 3)),
    ([(0, 3), (3, 5), (5, 6)], (4, 5), (1, 3)),  # straddles the start: the answer's
    ([(0, 3), (3, 5), (5, 6)], (2, 3), (0, 3)),
    ([(0, 3), (3, 5), (5, 6)], (9, 12), (3, 3)),
    ([(0, 1), (1, 2), (1, 2), (1, 2)], (1, 2), (1, 4)),
    ([], (0, 1), (0, 0)),
  ],
)
def test_every_token_of_the_answer_and_after_is_in_its_span(offsets, span, expected):
  assert pipeline.token_span(offsets, span) == expected


@pytest.mark.parametrize("kind", ("char", "sentencepiece", "hf"))
def test_no_token_before_the_answer_shows_any_of_it(kind, tmp_path):
  traces = [f"She sells {k} - 4 = {k - 4} eggs.\n#### {k - 4}" for k in range(5, 60)]
  t = {
    "char": lambda: tokenizer.CharTokenizer("".join(sorted(set("".join(traces))))),
    "sentencepiece": lambda: tokenizer.train_sentencepiece(traces, 284),
    "hf": lambda: tokenizer.load_tokenizer(tiny_tokenizer.make_directory(tmp_path)),
  }[kind]()
  for trace in traces:
    for start in (trace.index("####"), trace.index("####") - 1, trace.index("eggs") + 2):
      ids, offsets = t.encode_with_offsets(trace)
      first, end = pipeline.token_span(offsets, (start, len(trace)))
      assert end == len(ids)
      assert trace[:start].startswith(t.decode(ids[:first]))
      # and not a token more than that is hidden
      assert len(t.decode(ids[: first + 1])) > start


def test_nothing_before_the_answer_is_a_statement_of_it():
  """What stands before the span is nothing that the grader takes for the answer."""
  boxes = ["\\boxed{%s}", "\\fbox{%s}", "\\boxed %s", "\\boxed{%s"]
  marks = ["<answer>%s</answer>", "#### %s"]
  said = ["The answer is %s.", "the final answer is: %s", "The answer is $%s$"]
  statements = [*boxes, *marks, *said]
  for first in statements:
    for last in statements:
      for answer, spelled in (("36", "36"), ("1200", "1,200"), ("0.5", "\\frac{1}{2}")):
        trace = f"Add 7 and 5.\n{first % spelled}\nThat was it.\n{last % answer}\n"
        start, end = spans.find_answer_span(trace, answer)
        assert start == len("Add 7 and 5.\n") and end == len(trace)
        assert answers.find_answer(trace[:start]) is None


def test_real_traces_show_no_statement_of_the_answer_before_it():
  uri = f"jsonl:{shared_path('data', 'gsm8k', 'test.jsonl')}?format=gsm8k"
  for record in sources.load_records(uri).records:
    said = answers.find_answer(record.trace[: record.answer_span[0]])
    assert said is None or not values.value_spans(said, record.answer), record.id


# --- formats ---


def test_gsm8k_rows_are_traces_that_end_in_their_answer(tmp_path):
  uri = write_jsonl(
    tmp_path / "gsm8k" / "train.jsonl",
    [
      {"question": "How many?", "answer": "48/2 = <<48/2=24>>24.\n#### 1,024"},
      {"question": "Why?", "answer": "nobody knows"},
      {"question": "", "answer": "#### 1"},
      {"question": "Empty?", "answer": "x\n####  "},
    ],
  )
  loaded = sources.load_records(uri + "?format=gsm8k")
  (record,) = loaded.records
  assert record.id == "gsm8k/train/0"
  assert (record.question, record.answer) == ("How many?", "1024")
  assert record.trace[slice(*record.answer_span)] == "#### 1,024"
  assert loaded.dropped == {"no #### answer": 1, "no question": 1, "no answer": 1}
  stripped = sources.load_records(uri, format="gsm8k", strip_calculator=True).records[0]
  assert stripped.trace == "48/2 = 24.\n#### 1,024"
  assert stripped.trace[slice(*stripped.answer_span)] == "#### 1,024"


def test_metamath_keeps_answer_augmented_rows_and_one_per_question(tmp_path):
  def row(kind, query, response):
    return {"type": kind, "query": query, "original_question": query, "response": response}

  rows = [
    row("GSM_AnsAug", "Q1", "Sum is 5.\nThe answer is: 5"),
    row("GSM_Rephrased", "Q2", "The answer is: 6"),
    row("GSM_AnsAug", "Q1", "Another way.\nThe answer is: 5"),
    row("MATH_AnsAug", "Q3", "so $\\boxed{7}$.\nThe answer is: 7"),
    row("MATH_FOBAR", "Q4", "The answer is: 8"),
    row("GSM_AnsAug", "Q5", "I give up."),
  ]
  path = tmp_path / "MetaMathQA-395K.json"
  path.write_text(json.dumps(rows))  # one array, as it is downloaded
  loaded = sources.load_records(f"jsonl:{path}?format=metamath")
  assert [(r.question, r.answer) for r in loaded.records] == [("Q1", "5"), ("Q3", "7")]
  assert loaded.dropped == {
    "not an AnsAug type": 2,
    "question seen before": 1,
    'no "The answer is:"': 1,
  }
  assert [r.trace[slice(*r.answer_span)] for r in loaded.records] == [
    "The answer is: 5",
    "\\boxed{7}$.\nThe answer is: 7",
  ]


OPENR1 = [
  {
    "uuid": "u1",
    "problem": "P1",
    "solution": "Short: \\boxed{1}",
    "answer": "1",
    "generations": ["<think>no</think> \\boxed{2}", "<think>yes</think> \\boxed{1}"],
    "correctness_math_verify": [False, True],
    "correctness_llama": None,
    "is_reasoning_complete": [True, True],
    "messages": [{"role": "user", "content": "P1"}],
  },
  {
    "uuid": "u2",
    "problem": "P2",
    "solution": "See figure.",
    "answer": "2",
    "generations": ["\\boxed{3}"],
    "correctness_math_verify": [False],
    "correctness_llama": None,
    "is_reasoning_complete": [True],
    "messages": [],
  },
  {
    "uuid": "u3",
    "problem": "P3",
    "solution": "So \\boxed{x}",
    "answer": "x",
    "generations": ["<think>cut", "<think>so</think> \\boxed{ x }"],
    "correctness_math_verify": [False, False],
    "correctness_llama": [True, True],
    "is_reasoning_complete": [False, True],
    "messages": [],
  },
]


def test_openr1_traces_are_solutions_or_verified_generations(tmp_path):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(OPENR1), tmp_path / "train-0.parquet")
  uri = f"parquet:{tmp_path}/train-*.parquet?format=openr1"
  short = sources.load_records(uri)
  assert [r.trace for r in short.records] == ["Short: \\boxed{1}", "See figure.", "So \\boxed{x}"]
  assert [r.answer_span for r in short.records] == [(7, 16), None, (3, 12)]
  long = sources.load_records(uri, solution="generation")
  assert [r.trace for r in long.records] == [
    "<think>yes</think> \\boxed{1}",
    "<think>so</think> \\boxed{ x }",  # a language model's verdict; the cut one does not count
  ]
  assert long.dropped == {"no generation that was verified": 1}
  assert long.records[0].id.endswith("/u1")


def test_benchmarks_are_read_with_their_own_field_names(tmp_path):
  math = write_jsonl(
    tmp_path / "m.jsonl",
    [{"problem": "P", "answer": "16 \\sqrt{3}", "unique_id": "test/algebra/1.json"}],
  )
  amc = write_jsonl(tmp_path / "a.jsonl", [{"id": 0, "problem": "P", "answer": 27.0}])
  minerva = write_jsonl(
    tmp_path / "v.jsonl",
    [
      {"problem": "P", "solution": "so \\boxed{1.6} \\mathrm{~cm}", "idx": 0},
      {"problem": "P", "solution": "no box", "idx": 1},
    ],
  )
  assert sources.load_records(math, format="math").records[0].answer == "16 \\sqrt{3}"
  assert sources.load_records(amc, format="amc").records[0].answer == "27"
  loaded = sources.load_records(minerva, format="minerva")
  assert [r.answer for r in loaded.records] == ["1.6"]
  assert loaded.dropped == {"no boxed answer": 1}


def test_plain_rows_take_a_field_map_and_their_own_span(tmp_path):
  uri = write_jsonl(
    tmp_path / "x.jsonl",
    [
      {"q": "1+1", "a": 2, "cot": " one more: 2", "n": "first"},
      {"q": "2+2", "a": {"b": [4]}, "cot": " four 4", "answer_span": [1, 5], "n": "second"},
      {"q": "2+2", "a": "4", "cot": "4", "answer_span": [1, 5], "n": "third"},
    ],
  )
  loaded = sources.load_records(uri + "?question=q&answer=a&trace=cot&id=n")
  first, second = loaded.records
  assert (first.id, first.answer, first.trace) == (f"{tmp_path.name}/x/first", "2", "one more: 2")
  assert first.trace[slice(*first.answer_span)] == "2"
  assert second.answer == '{"b": [4]}'
  assert second.trace[slice(*second.answer_span)] == "four"
  assert loaded.dropped == {"answer_span outside the trace": 1}


def test_boxes_that_the_grader_reads_are_answers_of_minerva(tmp_path):
  solutions = [
    "It is \\fbox{4.5} m.",
    "It takes $\\boxed 7$ s.",
    "\\boxed{1}",
    "\\boxed{2 s",
    "\\boxed{}",
  ]
  rows = [{"problem": "P", "solution": text} for text in solutions]
  loaded = sources.load_records(write_jsonl(tmp_path / "v.jsonl", rows), format="minerva")
  assert [r.answer for r in loaded.records] == ["4.5", "7", "1", "2 s"]
  assert all(answers.find_answer(r.trace[: r.answer_span[0]]) is None for r in loaded.records)
  assert loaded.dropped == {"no boxed answer": 1}


def test_a_field_is_found_along_its_dots(tmp_path):
  row = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}],
    "reward_model": {"style": "rule", "ground_truth": 2},
    "a.b": "a name of its own",
    "solutions": ["so 2", "two"],
  }
  uri = write_jsonl(tmp_path / "x.jsonl", [row])
  names = "?question=prompt&answer=reward_model.ground_truth&trace=solutions.1&id=a.b"
  (record,) = sources.load_records(uri + names).records
  assert (record.answer, record.trace) == ("2", "two")
  assert record.id.endswith("/a name of its own")
  assert record.prompt == tuple(row["prompt"])
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "x.parquet")
  (same,) = sources.load_records(f"parquet:{tmp_path}/x.parquet{names}").records
  assert same == record


@pytest.mark.parametrize(
  "row, reason",
  [
    ({"question": ["a", "b"]}, "question: a message that is no object"),
    ({"question": [{"role": "tool", "content": "x"}]}, "question: a message with the role 'tool'"),
    ({"question": [{"role": "user", "content": [{"type": "image"}]}]}, "content is not text"),
    ({"question": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
     "messages that end with the role assistant"),
    ({"question": {"text": "x"}}, "question is an object, not text"),
    ({"trace": ["one", "two"]}, "trace is a list, not text"),
    ({"trace": {"steps": []}}, "trace is an object, not text"),
    ({"id": [1]}, "id is a list, not text"),
    ({"answer": []}, None),
    ({"answer": None}, "no answer"),
    ({"answer": float("nan")}, "no answer"),
    ({"answer": [float("nan")]}, "no answer"),
    ({"answer": float("inf")}, "no answer"),
    ({"question": float("nan")}, "no question"),
    ({"answer_span": "1-2", "trace": "abc"}, "answer_span outside"),
    ({"answer_span": ["a", "b"], "trace": "abc"}, "answer_span outside"),
  ],
)  # fmt: skip
def test_a_field_that_is_no_text_is_counted_and_never_taken_for_its_json(tmp_path, row, reason):
  rows = [{"question": "q", "answer": "1"}, {"question": "q", "answer": "1"} | row]
  loaded = sources.load_records(write_jsonl(tmp_path / "x.jsonl", rows))
  assert len(loaded.records) + sum(loaded.dropped.values()) == 2
  if reason:
    assert reason in sources.describe(loaded.dropped)
  assert loaded.records[0].question == "q"


def test_a_missing_value_of_a_table_is_no_value(tmp_path):
  """NaN is how tables write that there is nothing: no answer, no trace, no id "nan"."""
  nan = float("nan")
  rows = [
    {"question": "q", "answer": 3.0, "trace": nan, "id": nan, "answer_span": nan},
    {"question": "q", "answer": nan, "trace": nan, "id": 2.0, "answer_span": nan},
  ]
  json_uri = write_jsonl(tmp_path / "x.jsonl", rows)  # as JavaScript does not, but Python does
  columns = {name: pyarrow.array([row[name] for row in rows]) for name in rows[0]}
  pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
  for uri in (json_uri, f"parquet:{tmp_path}/x.parquet"):
    loaded = sources.load_records(uri)
    (record,) = loaded.records
    assert (record.answer, record.trace, record.answer_span) == ("3", "", None)
    assert record.id.endswith("/x/0") and loaded.dropped == {"no answer": 1}


def test_a_list_of_one_answer_is_that_answer(tmp_path):
  rows = [{"question": "q", "answer": answer} for answer in (["36"], [36.0], ["a", "b"], {"x": 1})]
  loaded = sources.load_records(write_jsonl(tmp_path / "x.jsonl", rows))
  assert [r.answer for r in loaded.records] == ["36", "36", '["a", "b"]', '{"x": 1}']


CHAT = [
  {"role": "system", "content": "Add."},
  {"role": "user", "content": "1+1"},
  {"role": "assistant", "content": "2"},
  {"role": "user", "content": " 30+6 "},
  {"role": "assistant", "content": "Three tens and six.\n#### 36\n"},
]


def test_chats_are_read_as_prompt_trace_and_answer(tmp_path):
  parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
  gpt = {"system": "system", "user": "human", "assistant": "gpt"}
  rows = [
    {"messages": CHAT},
    {"messages": parts, "answer": "36"},
    {"conversations": [{"from": gpt[m["role"]], "value": m["content"]} for m in CHAT]},
    {"messages": CHAT[:4]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    {"messages": []},
    {"messages": "Hi"},
    {"messages": ["Hi"]},
    {"messages": CHAT[:1]},
    {"messages": CHAT[2:3]},
    {"text": "Hi"},
  ]
  loaded = sources.load_records(write_jsonl(tmp_path / "x.jsonl", rows), format="chat")
  full, parts, gpt, open_ended, small_talk = loaded.records
  before = (*CHAT[:3], {"role": "user", "content": "30+6"})
  assert full.prompt == parts.prompt == gpt.prompt == open_ended.prompt == before
  assert full.trace == parts.trace == gpt.trace == "Three tens and six.\n#### 36"
  assert full.trace[slice(*full.answer_span)] == "#### 36"
  assert [r.answer for r in loaded.records] == ["36", "36", "36", "", ""]
  assert (open_ended.trace, small_talk.trace) == ("", "Hello.")
  assert sum(loaded.dropped.values()) == 6
  assert any("system" in reason for reason in loaded.dropped)


def test_template_and_system_text_are_for_the_last_question_of_a_chat(tmp_path):
  rows = [{"messages": CHAT}, {"messages": CHAT[1:]}]
  uri = write_jsonl(tmp_path / "x.jsonl", rows)
  own, without = sources.load_records(f"{uri}?format=chat&system=S&template={{question}}!").records
  assert [m["content"] for m in own.prompt] == ["Add.", "1+1", "2", "30+6!"]
  assert [m["content"] for m in without.prompt] == ["S", "1+1", "2", "30+6!"]


@pytest.mark.parametrize("value", [None, "Hi", [], [1], ["x"], {"role": "user"}, [{"role": "user"}],
                                   [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}],
                                   [{"role": ["user"], "content": "x"}], [[]]])  # fmt: skip
def test_what_is_no_chat_is_told(value):
  with pytest.raises(ValueError, match="message"):
    read_messages(value)


# --- tables ---


def test_text_columns_without_the_mark_of_text_are_text(tmp_path):
  texts = pyarrow.array(["1+1 é?", "2+2?"])
  forms = {
    "binary": texts.cast(pyarrow.binary()),
    "large binary": texts.cast(pyarrow.large_binary()),
    "large text": texts.cast(pyarrow.large_string()),
    "dictionary": texts.cast(pyarrow.binary()).dictionary_encode(),
    "nested": pyarrow.array([{"t": b"1+1 \xc3\xa9?"}, {"t": b"2+2?"}]),
    "list": pyarrow.array([[b"1+1 \xc3\xa9?"], [b"2+2?"]]),
  }
  names = {"nested": "&question=q.t", "list": "&question=q.0"}
  for name, column in forms.items():
    table = pyarrow.table({"q": column, "answer": pyarrow.array([b"2", b"4"])})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    uri = f"parquet:{tmp_path}/x.parquet?x={names.get(name, '&question=q')[1:]}".replace("x=q", "q")
    loaded = sources.load_records(uri.replace("?x=", "?"))
    assert [(r.question, r.answer) for r in loaded.records] == [("1+1 é?", "2"), ("2+2?", "4")]


def test_columns_that_nobody_reads_do_no_harm(tmp_path):
  """Times finer than Python's, bytes that are no text, and pages that are damaged."""
  n = 3000
  table = pyarrow.table(
    {
      "question": [f"question {k} " * 9 for k in range(n)],
      "answer": [str(k) for k in range(n)],
      "when": pyarrow.array(range(1, n + 1), pyarrow.timestamp("ns")),
      "bytes": pyarrow.array([b"\xff\xfe"] * n),
      "pages": [str(k * 7919) * 20 for k in range(n)],
    }
  )
  path = tmp_path / "x.parquet"
  pyarrow.parquet.write_table(table, path)
  expected = sources.load_records(f"parquet:{path}").records
  group = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
  damaged = bytearray(path.read_bytes())
  start = group.column(4).dictionary_page_offset
  damaged[start : start + 40] = b"\xff" * 40
  path.write_bytes(damaged)
  assert sources.load_records(f"parquet:{path}").records == expected
  for name, line in (("pages", "damaged"), ("bytes", "the column 'bytes' is not UTF-8")):
    with pytest.raises(UserError, match=rf"x.parquet: .*{line}"):
      sources.load_records(f"parquet:{path}?trace={name}")
  when = sources.load_records(f"parquet:{path}?answer=when&limit=1").records[0].answer
  assert when == "1970-01-01 00:00:00.000000001"
  path.write_bytes(damaged[:5000])
  with pytest.raises(UserError, match="not a Parquet file, or damaged"):
    sources.load_records(f"parquet:{path}")


def test_numbers_of_tables_are_written_as_people_write_them(tmp_path):
  cells = [decimal.Decimal("2.00"), decimal.Decimal("3.50")]
  for column, expected in (
    (cells, ["2", "3.50"]),
    ([2.0, 0.5], ["2", "0.5"]),
    ([7, 8], ["7", "8"]),
  ):
    table = pyarrow.table({"question": ["a", "b"], "answer": column})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    loaded = sources.load_records(f"parquet:{tmp_path}/x.parquet")
    assert [r.answer for r in loaded.records] == expected


CSV = 'question,answer,trace\n"1+1, or ""two""?",2,"so\n2"\n\n2+2?,4,\n'


@pytest.mark.parametrize(
  "name, data, options",
  [
    ("x.csv", CSV.encode(), ""),
    ("x.csv", b"\xef\xbb\xbf" + CSV.encode().replace(b"\n", b"\r\n"), ""),
    ("x.csv.gz", gzip.compress(CSV.encode(), mtime=0), ""),
    ("x.csv", CSV.encode("utf-16"), ""),
    ("x.tsv", CSV.replace(",", "\t").replace("1\t", "1,").encode(), ""),
    ("x.txt", CSV.replace(",", ";").replace("1;", "1,").encode(), "?delimiter=;"),
    ("x.txt", CSV.replace(",", "\t").replace("1\t", "1,").encode(), "?delimiter=tab"),
  ],
)
def test_csv_rows_are_records(tmp_path, name, data, options):
  (tmp_path / name).write_bytes(data)
  first, second = sources.load_records(f"csv:{tmp_path}/{name}{options}").records
  assert first.question.startswith("1+1") and first.question.endswith('or "two"?')
  assert (first.answer, first.trace.split()) == ("2", ["so", "2"])
  assert (second.question, second.answer, second.trace) == ("2+2?", "4", "")
  assert second.id == f"{tmp_path.name}/x/1"


@pytest.mark.parametrize(
  "text, options, line",
  [
    ("", "", "no header"),
    ("question,answer\n1,2,3\n", "", "line 2: 3 values for 2 columns"),
    ("question,question\n1,2\n", "", "column 'question' twice"),
    ("a,b\n1,2\n", "", "no row fits format=plain .*fields a, b"),
    ('question,answer\n"1+1,2\n', "", "line 2: not CSV"),
    ("question,answer\nq,1\n", "?delimiter=::", "one character, or tab"),
    ("question,answer\n\udcff,1\n", "", "line 2: not UTF-8"),
  ],
)
def test_a_broken_csv_file_is_one_clear_line(tmp_path, text, options, line):
  (tmp_path / "x.csv").write_text(text, errors="surrogateescape")
  with pytest.raises(UserError, match=line):
    sources.load_records(f"csv:{tmp_path}/x.csv{options}")


def test_a_csv_field_may_be_longer_than_the_modules_own_limit(tmp_path):
  (tmp_path / "x.csv").write_text("question,answer,trace\nq,1," + "x" * 200_000 + "\n")
  assert len(sources.load_records(f"csv:{tmp_path}/x.csv").records[0].trace) == 200_000


def test_datasets_of_the_hub_are_read_through_their_library(monkeypatch):
  asked = []

  def load_dataset(path, name, split, revision):
    asked.append((path, name, split, revision))
    if split == "nope":
      raise ValueError("Unknown split 'nope'.\nShould be one of ['train']")
    return [{"question": "1+1?", "answer": "two\n#### 2", "bytes": b"x"}]

  library = types.ModuleType("datasets")
  library.load_dataset = load_dataset
  monkeypatch.setitem(sys.modules, "datasets", library)
  uri = "hf:openai/gsm8k?name=main&split=test&revision=v1&format=gsm8k"
  (record,) = sources.load_records(uri).records
  assert (record.id, record.answer) == ("openai/gsm8k/test/0", "2")
  assert asked == [("openai/gsm8k", "main", "test", "v1")]
  with pytest.raises(UserError, match=r"hf:a/b: cannot be read .*Unknown split 'nope'. Should be"):
    sources.load_records("hf:a/b?split=nope")
  monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
  with pytest.raises(UserError, match="pip install datasets"):
    hub.read("a/b")
  with pytest.raises(UserError, match="hf:OWNER/NAME"):
    sources.load_records("hf:")


def test_the_end_of_a_trace_can_be_rewritten(tmp_path):
  uri = write_jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "two\n#### 2"}])
  (record,) = sources.load_records(
    uri, format="gsm8k", final="The answer is \\boxed{{answer}}"
  ).records
  assert record.trace == "two\nThe answer is \\boxed{2}"
  assert record.trace[slice(*record.answer_span)] == "The answer is \\boxed{2}"


def test_prompts_follow_the_template_and_system_text(tmp_path):
  uri = write_jsonl(tmp_path / "x.jsonl", [{"question": "1+1 {x}", "answer": "2"}])
  (record,) = sources.load_records(uri + "?system=Be%20brief.&template={question} Think.").records
  assert record.prompt == (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1 {x} Think."},
  )


def test_ids_are_unique_even_where_the_file_repeats_them(tmp_path):
  uri = write_jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "1", "id": 7}] * 3)
  ids = [r.id for r in sources.load_records(uri).records]
  assert len(set(ids)) == 3


def test_a_path_with_brackets_in_its_name_is_that_file(tmp_path):
  uri = write_jsonl(tmp_path / "run[1]" / "x.jsonl", [{"question": "q", "answer": "1"}])
  assert len(sources.load_records(uri).records) == 1


def test_a_stream_reads_no_further_than_it_is_asked(tmp_path):
  path = tmp_path / "s.jsonl"
  rows = [{"question": "q", "answer": str(k)} for k in range(2)] + [{"question": ""}]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
  stream = sources.stream_records(f"jsonl:{path}")
  records = iter(stream)
  assert [next(records).answer, next(records).answer] == ["0", "1"] and not stream.dropped
  with pytest.raises(UserError, match="line 4: not JSON"):
    next(records)
  assert stream.dropped == {"no question": 1}


def test_limit_counts_usable_records(tmp_path):
  rows = [{"question": q, "answer": "1"} for q in ("", "q0", "q1", "q2", "q3")]
  loaded = sources.load_records(write_jsonl(tmp_path / "x.jsonl", rows), limit=2)
  assert [r.question for r in loaded.records] == ["q0", "q1"]


# --- mistakes ---


@pytest.mark.parametrize(
  "uri, line",
  [
    ("train.jsonl", "no data source"),
    ("nowhere:x", "no data source"),
    ("jsonl:{dir}/no.jsonl", "no such file"),
    ("jsonl:{dir}", "is a directory"),
    ("jsonl:", "no such file"),
    ("jsonl:{dir}/no*.jsonl", "no such file"),
    ("jsonl:{dir}/no.json?format=metamath", "meta-math/MetaMathQA"),
    ("parquet:{dir}/no.parquet?format=openr1", "open-r1/OpenR1-Math-220k"),
    ("jsonl:{dir}/good.jsonl?fromat=amc", "fromat"),
    ("jsonl:{dir}/good.jsonl?format=amcc", "amcc"),
    ("jsonl:{dir}/good.jsonl?format=gsm8k", "no #### answer.*fields question, answer"),
    ("jsonl:{dir}/good.jsonl?question=problem", "2 x no question"),
    ("jsonl:{dir}/good.jsonl?limit=-1", "limit"),
    ("jsonl:{dir}/good.jsonl?limit=many", "limit"),
    ("jsonl:{dir}/good.jsonl?template=Hi", "{question}"),
    ("jsonl:{dir}/good.jsonl?format=gsm8k&strip_calculator=maybe", "true or false"),
    ("jsonl:{dir}/good.jsonl?format=openr1&solution=x", "solution or generation"),
    ("jsonl:{dir}/bad.jsonl", "bad.jsonl, line 2: not JSON"),
    ("jsonl:{dir}/list.jsonl", "list.jsonl, line 1: a JSON object"),
    ("jsonl:{dir}/cut.json", "cut.json: not JSON"),
    ("jsonl:{dir}/binary.jsonl", "not UTF-8"),
    ("jsonl:{dir}/empty.jsonl", "no record"),
    ("parquet:{dir}/good.jsonl", "not a Parquet file"),
    ("tfds:gsm8k", "tfds:NAME/SPLIT"),
    ("tfds:no_such_set/train?data_dir={dir}", "no TFDS dataset"),
    ("tfds:math500/test?data_dir={dir}&manual_dir={dir}", "HuggingFaceH4/MATH-500"),
    ("tfds:metamathqa/train?data_dir={dir}", "downloads/manual/metamathqa"),
    ("tfds:openr1_math/train?data_dir={dir}", r"train-\*.parquet"),
  ],
)
def test_a_mistake_is_one_clear_line(tmp_path, uri, line):
  good = '{"question": "q", "answer": "1"}\n' * 2
  for name, text in {
    "good.jsonl": good,
    "bad.jsonl": '{"question": "q", "answer": "1"}\n{"q',
    "list.jsonl": "7\n",
    "cut.json": '[{"question": "q"',
    "empty.jsonl": "\n",
  }.items():
    (tmp_path / name).write_text(text)
  (tmp_path / "binary.jsonl").write_bytes(b'{"question": "\xff\xfe"}\n')
  with pytest.raises(UserError, match=line):
    sources.load_records(uri.replace("{dir}", str(tmp_path)))


# --- TFDS ---


def test_our_tfds_builders_read_back_what_the_files_say(tmp_path):
  manual = tmp_path / "files"
  (manual / "metamathqa").mkdir(parents=True)
  rows = [
    {
      "type": "GSM_AnsAug",
      "query": f"Q{k}?",
      "original_question": f"Q{k}?",
      "response": f"naïve {k}\nThe answer is: {k}",
    }
    for k in range(30)
  ]
  (manual / "metamathqa" / "MetaMathQA-395K.json").write_text(json.dumps(rows))
  (manual / "openr1_math").mkdir()
  for part, name in ((OPENR1[:1], "train-00000-of-00002"), (OPENR1[1:], "train-00001-of-00002")):
    pyarrow.parquet.write_table(
      pyarrow.Table.from_pylist(part), manual / "openr1_math" / f"{name}.parquet"
    )
  where = f"?data_dir={tmp_path}/tfds&manual_dir={manual}"
  direct = {
    "metamathqa": f"jsonl:{manual}/metamathqa/MetaMathQA-395K.json?format=metamath",
    "openr1_math": f"parquet:{manual}/openr1_math/*.parquet?format=openr1",
  }
  for name, uri in direct.items():
    for options in ({},) if name == "metamathqa" else ({}, {"solution": "generation"}):
      prepared = sources.load_records(f"tfds:{name}/train{where}", **options)
      expected = sources.load_records(uri, **options)
      strip = [(r.prompt, r.trace, r.answer, r.answer_span) for r in expected.records]
      assert [(r.prompt, r.trace, r.answer, r.answer_span) for r in prepared.records] == strip
      assert prepared.dropped == expected.dropped
  # Prepared once, it is read without the files, and in slices.
  again = sources.load_records(f"tfds:metamathqa/train[:7]?data_dir={tmp_path}/tfds")
  assert [r.question for r in again.records] == [f"Q{k}?" for k in range(7)]


@pytest.mark.parametrize(
  "name, file_format, n",
  [("math500", "math", 500), ("amc23", "amc", 40), ("minerva_math", "minerva", 272)],
)
def test_real_benchmarks_through_tfds_equal_their_files(tmp_path, name, file_format, n):
  path = shared_path("data", name, "test.jsonl")
  direct = sources.load_records(f"jsonl:{path}?format={file_format}")
  through = sources.load_records(
    f"tfds:{name}/test?data_dir={tmp_path}&manual_dir={path.parent.parent}"
  )
  assert len(direct.records) == n and direct.dropped == {}
  assert through == direct


@pytest.mark.slow
def test_gsm8k_through_the_librarys_own_builder_equals_the_files(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  folder = shared_path("data", "gsm8k")
  few = tmp_path / "few.jsonl"  # the splits that nobody here reads
  few.write_text("".join((folder / "test.jsonl").read_text().splitlines(keepends=True)[:2]))

  def download(self, urls):
    return {split: folder / f"{split}.jsonl" if "socratic" not in split else few for split in urls}

  monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download)
  for split, n in (("train", 7473), ("test", 1319)):
    through = sources.load_records(f"tfds:gsm8k/{split}?data_dir={tmp_path}/tfds")
    direct = sources.load_records(f"jsonl:{folder}/{split}.jsonl?format=gsm8k")
    assert len(direct.records) == n and through.dropped == direct.dropped == {}

    def facts(loaded):  # TFDS shuffles while it prepares
      return sorted((r.question, r.trace, r.answer, r.answer_span) for r in loaded.records)

    assert facts(through) == facts(direct)
  with pytest.raises(UserError, match="no split 'valid': it has test, "):
    sources.load_records(f"tfds:gsm8k/valid?data_dir={tmp_path}/tfds")


def test_a_download_that_fails_is_one_clear_line(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  def download(self, urls):
    raise ConnectionError("no network")

  monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download)
  with pytest.raises(UserError, match=r"tfds:gsm8k cannot be prepared.*no network"):
    sources.load_records(f"tfds:gsm8k/train?data_dir={tmp_path}")


# --- sources of one's own ---


def test_a_registered_source_is_called_with_its_options():
  seen = {}

  @sources.register_source("mine")
  def load(path, n="2", **options):
    seen.update(options, path=path)
    return make_records(int(n))

  loaded = sources.load_records("mine:a/b?n=3&colour=red", size=7)
  assert len(loaded.records) == 3 and loaded.dropped == {}
  assert seen == {"path": "a/b", "colour": "red", "size": 7}
  with pytest.raises(UserError, match="letters"):
    sources.register_source("not a name")


def test_an_option_that_a_source_does_not_take_is_named():
  @sources.register_source("strict")
  def load(path):
    return make_records(1)

  with pytest.raises(UserError, match="unexpected keyword argument 'colour'"):
    sources.load_records("strict:x?colour=red")


@pytest.mark.slow
def test_the_worked_example_of_the_documentation_runs(tmp_path):
  page = (REPO / "docs" / "data.md").read_text()
  blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  assert blocks
  (tmp_path / "example.py").write_text("\n".join(blocks))
  done = subprocess.run(
    [sys.executable, "example.py"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    env={"PYTHONPATH": str(REPO), "PATH": "", "HOME": str(tmp_path)},
  )
  assert done.returncode == 0, done.stderr
  expected = re.search(r"```text\n(.*?)```", page, re.DOTALL).group(1)
  assert done.stdout == expected


# --- batches ---


def stream(n: int = 13, batch: int = 4, seed: int = 0, **options) -> pipeline.PromptStream:
  return pipeline.PromptStream(make_records(n), CHARS, batch, (4, 8, 12), seed, **options)


def test_prompts_are_padded_on_the_left_to_the_smallest_bucket_that_fits():
  s = stream()
  for step in range(8):
    b = s.batch(step)
    lengths = [len(CHARS.encode_prompt(r.prompt)) for r in b.records]
    assert b.tokens.dtype == np.int32 and b.valid.dtype == bool and b.row_id.dtype == np.uint32
    assert b.tokens.shape == (4, next(k for k in (4, 8, 12) if k >= max(lengths)))
    for row, record in enumerate(b.records):
      assert list(b.tokens[row][b.valid[row]]) == CHARS.encode_prompt(record.prompt)
      assert list(b.valid[row]) == sorted(b.valid[row])
      assert set(b.tokens[row][~b.valid[row]]) <= {CHARS.pad_id}
      assert CHARS.decode(b.traces[row]) == record.trace
      start, end = b.answer_spans[row]
      assert CHARS.decode(b.traces[row][start:end]) == record.trace[slice(*record.answer_span)]
  assert b.real.all()


def test_a_step_is_a_function_of_seed_and_step_alone():
  one, two = stream(), stream()
  later = [two.batch(step).row_id.tolist() for step in reversed(range(9))][::-1]
  assert [one.batch(step).row_id.tolist() for step in range(9)] == later
  other = [stream(seed=1).batch(step).row_id.tolist() for step in range(9)]
  assert other != later


def test_every_epoch_has_each_record_once_and_its_own_order():
  s = stream(n=12)
  epochs = [
    [r.id for step in range(3 * e, 3 * e + 3) for r in s.batch(step).records] for e in range(3)
  ]
  assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 12 for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("count", (1, 2, 4))
def test_the_shares_of_all_hosts_make_the_global_batch(count):
  whole = stream()
  parts = [stream(process_index=i, process_count=count) for i in range(count)]
  for step in (0, 3, 7):
    expected, shares = whole.batch(step), [p.batch(step) for p in parts]
    assert {s.tokens.shape for s in shares} == {(4 // count, expected.tokens.shape[1])}
    for name in ("tokens", "valid", "row_id"):
      joined = np.concatenate([getattr(s, name) for s in shares])
      np.testing.assert_array_equal(joined, getattr(expected, name))


@pytest.mark.parametrize("count", (1, 2))
def test_evaluation_gives_each_problem_once_on_however_many_hosts(count):
  seen, filled = [], 0
  for index in range(count):
    s = stream(process_index=index, process_count=count)
    batches = list(s.ordered_batches())
    assert len(batches) == s.num_ordered_batches() == 4
    for b in batches:
      assert len(b.records) == 4 // count
      seen += [r.id for r, real in zip(b.records, b.real, strict=True) if real]
      filled += int((~b.real).sum())
  assert sorted(seen) == sorted(r.id for r in make_records(13))
  assert filled == 3


def test_evaluation_keeps_the_order_and_starts_where_it_is_told():
  batches = list(stream().ordered_batches())
  ids = [r.id for b in batches for r, real in zip(b.records, b.real, strict=True) if real]
  assert ids == [r.id for r in make_records(13)]
  tail = list(stream().ordered_batches(start=2))
  assert [b.row_id.tolist() for b in tail] == [b.row_id.tolist() for b in batches[2:]]


def test_evaluation_of_fewer_records_than_rows_fills_up():
  (b,) = stream(n=3, batch=8).ordered_batches()
  assert b.real.tolist() == [True] * 3 + [False] * 5


def test_row_identity_is_the_records_and_differs_between_epochs():
  by_record = {}
  for batch in stream(n=12, batch=4).ordered_batches():
    by_record |= {r.id: i for r, i in zip(batch.records, batch.row_id, strict=True)}
  s = stream(n=12, batch=6, seed=5)
  for b in (s.batch(0), s.batch(1)):
    assert all(by_record[r.id] == i for r, i in zip(b.records, b.row_id, strict=True))
  second = {i for b in (s.batch(2), s.batch(3)) for i in b.row_id.tolist()}
  assert not second & {int(i) for i in by_record.values()}
  assert pipeline.row_identity("r/0", 0) == 2646047685  # the same on every machine


def test_a_batch_larger_than_the_data_repeats_records_with_other_identities():
  b = stream(n=3, batch=8).batch(0)
  assert len({r.id for r in b.records}) == 3
  assert len(set(b.row_id.tolist())) == 8


def test_what_is_left_out_is_counted_by_reason():
  records = [
    *make_records(5),
    Record("long", ({"role": "user", "content": "1" * 12},), "", "1"),
    Record("bare", ({"role": "user", "content": "1"},), "", "1"),
    Record("vague", ({"role": "user", "content": "1"},), "1", "1"),
  ]
  s = pipeline.PromptStream(records, CHARS, 2, (8, 12), 0)
  assert len(s) == 7
  assert s.dropped == {"prompt longer than the longest bucket": 1}
  assert s.notes == {"empty trace": 1, "answer span unknown": 1}
  assert pipeline.PromptStream(records, CHARS, 2, (8, 12), 0, max_trace=6).dropped == {
    "prompt longer than the longest bucket": 1,
    "trace too long": 5,
  }
  sft = pipeline.SFTStream(records, CHARS, 2, (8, 12), 0, response_length=7)
  assert len(sft) == 1
  assert sft.dropped == {
    "prompt longer than the longest bucket": 1,
    "empty trace": 1,
    "response too long": 5,
  }
  assert sum(sft.dropped.values()) + len(sft) == len(records)


@pytest.mark.parametrize(
  "make, line",
  [
    (lambda: pipeline.PromptStream([], CHARS, 2, (8,), 0), "there are none"),
    (lambda: pipeline.PromptStream(make_records(4), CHARS, 2, (1,), 0), "4 x prompt longer"),
    (lambda: pipeline.PromptStream(make_records(4) * 2, CHARS, 2, (8,), 0), "two records"),
    (lambda: stream(batch=3, process_count=2), "multiple"),
    (lambda: stream(batch=0), "multiple"),
    (lambda: pipeline.PromptStream(make_records(4), CHARS, 2, (8, 4), 0), "buckets"),
    (lambda: pipeline.PromptStream(make_records(4), CHARS, 2, (), 0), "buckets"),
    (lambda: pipeline.SFTStream(make_records(4), CHARS, 2, (8,), 0, 3), "response too long"),
  ],
)
def test_a_stream_that_cannot_be_is_one_clear_line(make, line):
  with pytest.raises(UserError, match=line):
    make()


def test_responses_end_their_turn_and_are_filled_with_end_of_text(tmp_path):
  t = tokenizer.load_tokenizer(tiny_tokenizer.make_directory(tmp_path))
  s = pipeline.SFTStream(make_records(9), t, 4, (64, 128), 3, response_length=24)
  b = s.batch(1)
  assert b.tokens.shape == b.valid.shape == b.response.shape == (4, 64 + 24)
  assert b.response[:, 64:].all() and not b.response[:, :64].any()
  assert b.valid[:, 64:].all()
  by_row = {pipeline.row_identity(r.id, 0): r for r in make_records(9)}
  for row in range(4):
    record = by_row[int(b.row_id[row])]
    response = b.tokens[row][b.response[row]]
    n = b.length[row]
    assert t.decode(response) == record.trace
    assert n == len(t.encode(record.trace)) + 1
    assert response[n - 1] == t.turn_id != t.eos_id
    assert set(response[n:].tolist()) == {t.eos_id}
    assert list(b.tokens[row, :64][b.valid[row, :64]]) == t.encode_prompt(record.prompt)


def test_a_response_that_just_fits_is_kept():
  records = make_records(3)  # traces of 7 tokens and the end of text
  assert len(pipeline.SFTStream(records, CHARS, 2, (8,), 0, response_length=8)) == 3
  with pytest.raises(UserError):
    pipeline.SFTStream(records, CHARS, 2, (8,), 0, response_length=7)


def test_sft_shares_of_hosts_make_the_global_batch():
  def make(**options):
    return pipeline.SFTStream(make_records(13), CHARS, 4, (4, 8, 12), 0, 12, **options)

  whole, parts = make(), [make(process_index=i, process_count=2) for i in range(2)]
  for step in (0, 5):
    for name in ("tokens", "valid", "response", "length", "row_id"):
      joined = np.concatenate([getattr(p.batch(step), name) for p in parts])
      np.testing.assert_array_equal(joined, getattr(whole.batch(step), name))


def test_formats_name_where_their_files_come_from():
  assert all(f.origin for name, f in formats.FORMATS.items() if name not in ("plain", "chat"))


def test_every_file_that_the_configs_name_has_a_line_that_fetches_it():
  page = (REPO / "docs" / "data.md").read_text()
  lines = re.search(r"<!-- downloads -->\n```bash\n(.*?)```", page, re.DOTALL).group(1)
  named = ["LLaDA-8B-Instruct", "openr1/train-*.parquet"]  # init_from, and what is rewritten
  for name in ("llada_math.py", "gsm8k.py", "math500.py", "amc.py", "minerva.py"):
    config = load_config_file(REPO / "configs" / name, "data")
    uris = [config.data.rl, *(item.partition("=")[2] for item in config.data.eval)]
    named += [re.match(r"jsonl:data/([^?]*)", uri).group(1) for uri in uris]
  config = load_config_file(REPO / "configs" / "gsm8k_tiny.py", "data/gsm8k")
  named.append(re.match(r"jsonl:data/([^?]*)", config.data.sft).group(1))
  for path in named:
    folder, _, file = path.rpartition("/")
    where = f"data/{folder}".rstrip("/")
    fetched = [line for line in lines.split("\n") if file in line and where in line]
    assert fetched, path
