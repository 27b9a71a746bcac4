"""The parts of `igpo_jax.rewrite`: client, journal, trimming, bounded memory, lengths of traces."""

from __future__ import annotations

import asyncio
import email.utils
import io
import json
import re
import time
import tracemalloc

import httpx2
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from igpo_jax.data.records import Record
from igpo_jax.data.sources import load_records
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.errors import UserError
from igpo_jax.rewards.score import Scorer
from igpo_jax.rewrite import client as chat
from igpo_jax.rewrite import journal, lengths, prompts, trim
from igpo_jax.rewrite.engine import Engine
from igpo_jax.rewrite.journal import Journal, Paths
from igpo_jax.rewrite.judge import Judge, Verdict
from igpo_jax.tasks import chains, letter_maps
from tests.paths import shared_path

words = lambda text: len(text.split()) + 1


def record(trace="So 2.\n\\boxed{2}", answer="2", name="r0", question="1 + 1?"):
  return Record(name, ({"role": "user", "content": question},), trace, answer)


# --- the client ------------------------------------------------------------------------


def ask(handler, times=1, **options):
  """Replies or errors of a client whose server is a function."""

  async def go():
    options.setdefault("backoff", 0.0)
    client = chat.ChatClient("http://127.0.0.1:9/v1", "m", "the-key", **options)
    await client._http.aclose()
    client._http = httpx2.AsyncClient(transport=httpx2.MockTransport(handler))
    async with client:
      out = []
      for _ in range(times):
        try:
          out.append(await client.complete([{"role": "user", "content": "q"}]))
        except (UserError, chat.Refused, chat.Failed) as error:
          out.append(error)
      return out, client.requests

  return asyncio.run(go())


def good(text="\\boxed{2}", **choice):
  body = {"choices": [{"message": {"content": text}} | choice], "usage": {"prompt_tokens": 7}}
  return httpx2.Response(200, json=body)


@pytest.mark.parametrize(
  ("status", "told"),
  [
    (403, "put a valid key"),
    (404, "check --endpoint (usually it ends in /v1) and --model"),
    (400, "check --model, --endpoint and --extra"),
    (301, "give the address it points to as --endpoint (http://there)"),
  ],
)
def test_what_only_the_user_can_mend_is_not_tried_again(status, told):
  headers = {"location": "http://there"}
  (error,), requests = ask(lambda _: httpx2.Response(status, text="no the-key", headers=headers))
  assert isinstance(error, UserError) and requests == 1
  assert f"HTTP {status}" in str(error) and told in str(error) and "the-key" not in str(error)


def test_a_quota_that_is_used_up_is_no_rate_limit():
  body = {"error": {"message": "You exceeded it", "code": "insufficient_quota"}}
  (error,), requests = ask(lambda _: httpx2.Response(429, json=body))
  assert isinstance(error, UserError) and "quota is used up" in str(error) and requests == 1


def test_a_400_after_an_answer_or_about_the_text_concerns_its_record():
  answers = iter([good(), httpx2.Response(400, text="no")])
  (_, error), _ = ask(lambda _: next(answers), times=2)
  assert isinstance(error, chat.Refused)
  told = "This model's maximum context length is 4096 tokens"
  (error,), _ = ask(lambda _: httpx2.Response(400, json={"error": {"message": told}}))
  assert isinstance(error, chat.Refused) and told in str(error)


def test_retries_are_bounded_and_told():
  (error,), requests = ask(lambda _: httpx2.Response(502, text="bad the-key"), retries=3)
  assert isinstance(error, chat.Failed) and requests == 4
  assert str(error) == "HTTP 502: bad [key]"


def test_waits_double_up_to_a_minute(monkeypatch):
  waits = []

  async def sleep(self, seconds):
    waits.append(seconds)

  monkeypatch.setattr(chat.ChatClient, "_sleep", sleep)
  ask(lambda _: httpx2.Response(500), retries=9, backoff=1.0)
  for wait, longest in zip(waits, (1, 2, 4, 8, 16, 32, 60, 60, 60), strict=True):
    assert longest / 2 <= wait <= longest


def test_retry_after_is_a_number_or_a_date():
  assert chat.retry_after("3") == 3 and chat.retry_after("0.5") == 0.5
  date = email.utils.formatdate(time.time() + 30, usegmt=True)
  assert 28 <= chat.retry_after(date) <= 30
  past = email.utils.formatdate(time.time() - 30, usegmt=True)
  assert chat.retry_after(past) == chat.retry_after("-3") == 0
  assert chat.retry_after(None) is chat.retry_after("soon") is chat.retry_after("nan") is None


@pytest.mark.parametrize(
  ("content", "finish", "text", "cut_off"),
  [
    (" a \n", "stop", "a", False),
    ("<think>hm \\boxed{3}</think>\nb", "stop", "b", False),
    ([{"type": "text", "text": "c"}, {"type": "text", "text": "d"}], "stop", "cd", False),
    (None, "stop", "", False),
    ("e", "length", "e", True),
  ],
)
def test_replies_are_read_as_endpoints_write_them(content, finish, text, cut_off):
  (reply,), _ = ask(lambda _: good(content, finish_reason=finish))
  assert reply == chat.Reply(text, cut_off, 7, 0)


@pytest.mark.parametrize("body", ["", "{", "[]", "{}", '{"choices": []}', '{"choices": [{}]}', "7"])
def test_a_body_that_is_no_completion_is_tried_again(body):
  answers = iter([httpx2.Response(200, text=body), good()])
  (reply,), requests = ask(lambda _: next(answers))
  assert reply.text == "\\boxed{2}" and requests == 2


@pytest.mark.parametrize(
  ("endpoint", "url"),
  [
    ("http://h:1/v1", "http://h:1/v1/chat/completions"),
    ("https://h/v1/", "https://h/v1/chat/completions"),
    ("http://h/v1/chat/completions", "http://h/v1/chat/completions"),
  ],
)
def test_the_address_is_the_protocols(endpoint, url):
  assert chat.completions_url(endpoint) == url


def test_braces_of_tex_survive_the_prompt():
  r = record("Take \\frac{1}{2}, {answer}.", "\\frac{1}{2}", question="{trace} of {max_tokens}?")
  system, user = (m["content"] for m in prompts.messages(r, 100))
  assert "at most 100 tokens" in system and "inside \\boxed{}," in system
  assert "{trace} of {max_tokens}?" in user and "\\frac{1}{2}, {answer}." in user
  assert user.count("Final answer: \\frac{1}{2}") == 1


# --- the journal -----------------------------------------------------------------------


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.binary(max_size=40), st.integers(1, 7))
def test_mending_keeps_whole_lines_and_nothing_else(content, block):
  file = io.BytesIO(content)
  journal.mend(file, block)
  assert file.getvalue() == content[: content.rfind(b"\n") + 1]


def test_a_journal_takes_up_where_it_was(tmp_path):
  path = tmp_path / "a.jsonl"
  with Journal(path, {"x": 1}) as first:
    first.accept({"id": "a", "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    first.reject({"id": "b", "reasons": ["wrong answer", "too long"]})
    with pytest.raises(ValueError, match="decided before"):
      first.accept({"id": "b"})
    with pytest.raises(UserError, match="another process is writing"):
      Journal(path, {"x": 1})
  with open(path, "ab") as file:
    file.write('{"id": "ü'.encode()[:-1])  # cut within a letter
  with Journal(path, {"x": 1}) as again:
    assert (again.accepted, again.rejected, len(again)) == (1, 1, 2)
    assert "a" in again and "b" in again and "c" not in again
    assert again.reasons == {"too long": 1} and again.usage["prompt_tokens"] == 3
    again.accept({"id": "c"})
  assert [row["id"] for row in journal.read_rows(path)] == ["a", "c"]


def test_files_that_are_not_the_journals_are_told(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"id": "a"}\n')
  with pytest.raises(UserError, match=r"a\.settings\.json is missing"):
    Journal(path, {"x": 1})
  Paths(path).settings.write_text('{"x": 1}')
  path.write_text('{"id": "a"}\nbroken\n{"id": "b"}\n')
  with pytest.raises(UserError, match="line 2: not a row"):
    Journal(path, {"x": 1})


# --- memory ----------------------------------------------------------------------------


@pytest.mark.slow
def test_no_more_records_live_than_are_in_flight(tmp_path):
  """3,000 records of 50 kB each: 150 MB if they were kept."""
  live, most, n = 0, 0, 3000

  def source():
    nonlocal live, most
    for k in range(n):
      live += 1
      most = max(most, live)
      yield record("x" * 50_000 + str(k), name=f"r{k}")

  class Write:
    attempts, made_by = 1, "test"

    async def __call__(self, record, earlier):
      nonlocal live
      await asyncio.sleep(0)
      live -= 1
      return chat.Reply(record.trace[-20:])

  class Decide(Judge):
    async def gradable(self, record):
      return True

    async def __call__(self, record, text, cut_off=False):
      return Verdict(None if record.id[-1] != "7" else "wrong answer", "", 3)

    def count(self, text):
      return len(text)

  async def go(entries):
    await Engine(Write(), Decide(None, None, 10), entries, concurrency=16).run(source())

  tracemalloc.start()
  with Journal(tmp_path / "a.jsonl", {}) as entries:
    asyncio.run(go(entries))
    assert (entries.accepted, entries.rejected) == (n - n // 10, n // 10)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert most <= 17 and peak < 10e6


# --- trimming --------------------------------------------------------------------------

REASONING = """<think>
Okay, so we need the number of apples. She has 3 bags of 4.
3 * 4 = 13.
Wait, that's not right. Let me recompute.
3 * 4 = 12.
Let me start over.
There are 3 bags with 4 apples each, 3 * 4 = 12 apples.
Hmm, is that right? Let me check: 4 + 4 + 4 = 12. Yes.
She eats 2.5 of them, 12 - 2.5 = 9.5 are left. She eats 2.5 of them, 12 - 2.5 = 9.5 are left.
The answer is \\boxed{9.5}."""


def test_trimming_keeps_the_last_derivation_and_the_answer():
  assert trim.trim(REASONING, "9.5", words, 200) == (
    "There are 3 bags with 4 apples each, 3 * 4 = 12 apples.\n"
    "Yes.\n"
    "She eats 2.5 of them, 12 - 2.5 = 9.5 are left. The answer is \\boxed{9.5}."
  )


def test_what_a_reasoning_model_wrote_after_thinking_is_the_derivation():
  text = REASONING + "\n</think>\n\n12 apples.\nMinus 2.5 is 9.5.\n\\boxed{9.5}"
  assert trim.trim(text, "9.5", words, 200) == "12 apples.\nMinus 2.5 is 9.5.\n\\boxed{9.5}"


@pytest.mark.parametrize(
  "after",
  ["**Final Answer**\n\\boxed{5}", "**Answer:**\n\n\\boxed{5}", "### Solution\n\\boxed{5}",
   "\\boxed{5}", "---\n\n## Final answer\n\\boxed{5}", "#### 5",
   "Final Answer:\nThe answer is \\boxed{5}.", "**Conclusion.**\nThe final answer is 5.",
   "Answer\n======\n\\boxed{5}", "So, here is my final solution:\n\\boxed{5}",
   "Solution 2:\n#### 5", "**Step 3**\n\\boxed{5}", "Thus:\n$$\\boxed{5}$$"],
)  # fmt: skip
def test_a_heading_and_the_answer_are_no_derivation(after):
  thought = "2 and 3 are added, 2+3=5."
  for text in (f"<think>\n{thought}\n</think>\n\n{after}", f"{thought}\n</think>\n{after}"):
    trimmed = trim.trim(text, "5", words, 200)
    assert "2+3=5" in trimmed and trimmed.endswith(after.strip())


@pytest.mark.parametrize(
  "after",
  ["2+3=5.\n\\boxed{5}", "**Solution**\nAdd 2 and 3.\n**Answer**\n\\boxed{5}",
   "Adding both of the numbers gives the sum.\n\\boxed{5}", "$x = 2+3$\n#### 5",
   "## Step 1\nWe add them: 2+3.\n\\boxed{5}"],
)  # fmt: skip
def test_what_has_a_step_in_it_is_a_derivation(after):
  assert trim.trim(f"<think>\nLong.\n9 - 4.\n</think>\n{after}", "5", words, 200) == after


def test_an_answer_that_was_stated_early_does_not_keep_what_follows_it():
  text = "2 + 3 = 5, so the answer is 5.\nWait, is that right?\n2 + 3 = 5 it is.\n\\boxed{5}"
  assert "Wait" not in trim.trim(text, "5", words, 200)
  boxed = text.replace("the answer is 5", "it is \\boxed{5}")
  assert "Wait" not in trim.trim(boxed, "5", words, 200)


@pytest.mark.parametrize("heading", ["### Solution 2", "**Attempt 2**", "Step 1:", "Let me see:"])
def test_a_new_start_with_a_heading_only_is_no_new_derivation(heading):
  text = f"2+3=5 holds here.\nLet me try again.\n{heading}\n\\boxed{{5}}"
  assert "2+3=5" in trim.trim(text, "5", words, 200)


@pytest.mark.parametrize(("room", "left"), [(100, 4), (17, 3), (12, 2), (1, 2)])
def test_too_long_a_trace_loses_its_first_sentences_but_never_all(room, left):
  text = "First a = 1 holds. Then b = 2 follows. So a + b = 3.\n#### 3"
  assert len(trim.sentences(trim.trim(text, "3", words, room))) == left
  assert trim.trim(text, "3", words, room).endswith("So a + b = 3.\n#### 3")


@pytest.mark.parametrize(
  "text",
  ["Wait times are 5 min each.", "So far 3 are left.", "Checking accounts hold $5.",
   "Interest is 5%.", "Butter costs 3.", "Nowhere is x > 2."],
)  # fmt: skip
def test_sentences_of_a_problem_are_no_reflections(text):
  assert not trim.REFLECTIONS.match(text)


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(st.text("ab. $\\[]\nW3!?", max_size=60))
def test_sentences_joined_are_the_text(text):
  parts = trim.sentences(text)
  assert (
    "".join(parts) == text
    or not "".join([*parts, ""]).strip()
    or (text.startswith("".join(parts)) and not text[len("".join(parts)) :].strip())
  )


def test_formulas_are_not_cut():
  text = "Let $a. B = 2$ hold. Then \\[x. \nY\\] is it.\n"
  assert trim.sentences(text) == ["Let $a. B = 2$ hold. ", "Then \\[x. \nY\\] is it.\n"]


def test_alignment_of_verbose_chains_gives_back_the_concise_ones():
  options = "synthetic:chains?min_steps=4&max_steps=4&n=300&seed=5&rare_share=0.3"
  concise = load_records(options).records
  verbose = load_records(f"{options}&detours=1").records
  assert [(r.question, r.answer) for r in verbose] == [(r.question, r.answer) for r in concise]
  tokenizer = CharTokenizer(chains.ALPHABET)
  length = np.array([len(tokenizer.encode(r.trace)) + 1 for r in verbose])
  assert length.mean() > 40 and (length <= 24).mean() < 0.1  # what fits 24 is the concise
  for short, long in zip(concise, verbose, strict=True):
    assert trim.rules("chains")(long.trace, long.answer, len, 24) == short.trace
    assert long.trace[slice(*long.answer_span)] == f"=>{long.answer}"
  with Scorer("exact") as scorer:
    assert scorer([r.trace for r in verbose], verbose).correct.all()


def test_alignment_of_verbose_maps_gives_back_the_concise_ones():
  options = "synthetic:maps?steps=8&n=300&seed=5"
  concise = load_records(options).records
  verbose = load_records(f"{options}&detours=1").records
  assert [(r.question, r.answer) for r in verbose] == [(r.question, r.answer) for r in concise]
  count = lambda text: len(CharTokenizer(letter_maps.ALPHABET).encode(text)) + 1
  assert np.mean([count(r.trace) <= 11 for r in verbose]) < 0.1
  rules = trim.rules("maps")
  for short, long in zip(concise, verbose, strict=True):
    assert rules(long.trace, long.answer, count, 11) == short.trace
    assert count(short.trace) == 11


@pytest.mark.slow
def test_every_real_trace_that_is_accepted_keeps_its_answer(tmp_path):
  """GSM8K's own traces at half their longest length, through the command's parts."""
  source = f"jsonl:{shared_path('data', 'gsm8k', 'test.jsonl')}?format=gsm8k&strip_calculator=true"
  records = load_records(source).records
  room = 64
  trimmed = [trim.trim(r.trace, r.answer, words, room) for r in records]
  fits = [k for k, text in enumerate(trimmed) if words(text) <= room]
  assert len(fits) > 0.95 * len(records)
  with Scorer("math", workers=1) as scorer:
    verdicts = scorer([trimmed[k] for k in fits], [records[k] for k in fits])
  assert verdicts.correct.all()
  before = np.mean([words(r.trace) for r in records])
  after = np.mean([words(trimmed[k]) for k in fits])
  assert 0.5 * before < after < before
  for k in fits:  # nothing is written that was not there
    assert all(line.strip() in records[k].trace for line in trimmed[k].split("\n"))


# --- lengths ---------------------------------------------------------------------------


def test_the_report_counts_what_the_files_hold(tmp_path):
  path = tmp_path / "a.jsonl"
  with Journal(path, {"mode": "trim", "max_tokens": 50, "tokenizer": "t"}) as entries:
    for k in range(100):
      row = {"id": f"r{k}", "source_tokens": 10 * (k + 1)}
      if k < 80:
        entries.accept(row | {"tokens": k + 1})
      else:
        entries.reject(row | {"reasons": ["too long"]})
  report = lengths.make_report(path, [40, 100])
  assert report["accepted"] == 80 and report["rejected"] == {"too long": 20}
  before, kept, after = (
    report["lengths"][name] for name in ("before", "before, accepted ones", "after")
  )
  assert (before["n"], kept["n"], after["n"]) == (100, 80, 80)
  assert before["max"] == 1000 and kept["max"] == 800 and after["max"] == 80
  assert before["within"] == {"40": 0.04, "100": 0.1} and after["within"] == {"40": 0.5, "100": 1.0}
  assert after["percentiles"]["50"] == 40.5 and after["mean"] == 40.5
  assert json.loads(Paths(path).report.read_text()) == report
  assert Paths(path).picture.read_bytes().startswith(b"\x89PNG")
  text = lengths.table(report)
  assert re.search(r"\| after \| 80 \| 40\.5 .* \| 50\.0% \| 100\.0% \|", text)


def test_a_report_of_nothing_is_told(tmp_path):
  with pytest.raises(UserError, match=r"settings\.json is missing"):
    lengths.make_report(tmp_path / "a.jsonl", [256])
  Journal(tmp_path / "a.jsonl", {}).close()
  with pytest.raises(UserError, match="no row to report on"):
    lengths.make_report(tmp_path / "a.jsonl", [256])
