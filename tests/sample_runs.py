"""Workdirs as runs leave them, made in no time: rows of a small group with every kind of text."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

from igpo_jax.config import Config

# What a model or a data set may say, and a page or a terminal must only show.
HOSTILE = {
  "script": "</script><script>document.title='owned'</script>",
  "comment": "<!--<script>",
  "image": "<img src=x onerror=\"document.title='owned'\">",
  "entity": "&lt;b&gt; & &#x3c;",
  "right to left": "\u202eevil\u202c \u2067abc\u2069 \u200fx",
  "nul": "a\0b\x1b[31mred\x07",
  "surrogate": "half \ud83d and \udc00",
  "emoji": "🙂👩\u200d🔬",
  "lines": "one\ntwo\r\nthree\u2028four",
  "template": "{{ 7 * 7 }} {% raw %} ${7*7}",
  "long": "x" * 1_000_000,
}
BLOCK, LENGTH = 4, 8


def row(step, group, phase, number, used, partner=None, text="12=>7", correct=False, **more):
  """A row of samples.jsonl; its first pieces are the text, the rest ends it."""
  pieces = [text[:3], text[3:], "7", *["<eos>"] * (LENGTH - 3)]
  hinted = phase == "hinted"
  return {
    "stage": "rl", "step": step, "version": 2, "group": group, "id": f"p{group}",
    "prompt": f"question {group}", "answer": "7", "completion": text, "tokens": [*range(LENGTH)],
    "pieces": pieces, "hints": [[0, 2]] if hinted else [],
    "commit_step": [-1, -1, *range(LENGTH - 2)] if hinted else [1, 0, *range(2, LENGTH)],
    "commit_logp": [math.log((k + 1) / 10) for k in range(LENGTH)], "reward": float(correct),
    "parts": {"correct": float(correct)}, "correct": correct, "status": "ok",
    "extracted": "7" if correct else text, "reason": "the answer is right" if correct else "wrong",
    "phase": phase, "used": used, "number": number, "partner": partner,
    "advantage": None if used in ("replaced", "dropped") else correct - 0.5,
    **more,
  }  # fmt: skip


def samples(steps=(1, 2), text="12=>7"):
  """Of each step: group 0, all wrong, with an inserted completion; group 1, right at once."""
  stats = {"logp": [-0.5] * LENGTH, "entropy": [0.1 * k for k in range(LENGTH)],
           "ratio": [1.1] * LENGTH, "kept": [False, *[True] * (LENGTH - 1)]}  # fmt: skip
  rows = []
  for step in steps:
    rows += [
      row(step, 0, "hinted", 1, "inserted", 0, text, True, answer_shown=True, token_stats=stats),
      row(step, 0, "own", 0, "replaced", 1, text),
      row(step, 0, "hinted", 0, "dropped", None, text, status="unparseable", extracted=None),
      row(step, 0, "own", 1, "kept", None, text),
      row(step, 1, "own", 0, "kept", None, text, True),
      row(step, 1, "own", 1, "kept", None, text, True),
    ]
  return rows


def make_run(folder: pathlib.Path, seed=0, steps=20, rows=None, **config) -> pathlib.Path:
  """A finished run with SFT, RL and three evaluations of four problems."""
  (folder / "tokenizer").mkdir(parents=True)
  options = json.loads(json.dumps(dataclasses.asdict(Config(seed=seed))))
  options["rl"] |= {"steps": steps}
  options["sampler"] |= {"gen_length": LENGTH, "block_length": BLOCK}
  options |= config
  options["resolved"] = {"devices": "1 x cpu", "versions": {"jax": "0.10.2"}, "command": "run it"}
  (folder / "config.json").write_text(json.dumps(options))
  score = lambda value: {
    "eval/test/accuracy": value, "eval/test/low": value - 0.1, "eval/test/high": value + 0.1,
    "eval/test/stderr": 0.05, "eval/test/n": 4, "eval/test/samples": 1,
  }  # fmt: skip
  metrics = [{"stage": "init", "step": 0, **score(0.25)}]
  metrics += [
    {"stage": "sft", "step": k, "sft/loss": 3 / k, "time/step_seconds": 0.1}
    for k in range(1, steps + 1)
  ]
  metrics[-1] |= score(0.5)
  for k in range(1, steps + 1):
    wrong = 0.5 + 0.3 * math.sin(k + seed)
    metrics.append({
      "stage": "rl", "step": k, "rl/reward": 1 - wrong, "rl/reward_after": 1.1 - wrong,
      "rl/all_wrong_before": wrong, "rl/all_wrong_after": wrong / 2, "rl/kl": 0.01 * k,
      "rl/entropy": 0.5, "rl/length": 6.0, "rl/extra_correct": 0.2, "rl/answer_shown": 0.0,
      "rl/accuracy": 1 - wrong, "rl/replaced": 0.1, "time/step_seconds": 0.5,
    })  # fmt: skip
  metrics[-1] |= score(0.75)
  write_rows(folder / "metrics.jsonl", metrics)
  write_rows(folder / "samples.jsonl", samples() if rows is None else rows)
  for label, right in (("init", (1, 0, 0, 0)), (f"sft-{steps}", (1, 1, 0, 0)),
                       (f"rl-{steps}", (1, 0, 1, 1))):  # fmt: skip
    path = folder / "evals" / label / "plain"
    path.mkdir(parents=True)
    write_rows(path / "test-0123abcd.jsonl", [
      {"id": f"e{k}", "sample": 0, "question": f"item {k}", "completion": f"{label} says {k}",
       "answer": "7", "correct": bool(ok), "extracted": "7" if ok else "8", "status": "ok"}
      for k, ok in enumerate(right)
    ])  # fmt: skip
  return folder


def write_rows(path: pathlib.Path, rows) -> None:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def hostile_run(folder: pathlib.Path) -> pathlib.Path:
  """A run in which every text is hostile: a group per text."""
  rows = []
  for group, text in enumerate(HOSTILE.values()):
    rows += [row(1, group, "own", 0, "kept", None, text, prompt=text, answer=text, id=text,
                 extracted=text, reason=text)]  # fmt: skip
  run = make_run(folder, rows=rows)
  path = run / "evals" / "rl-20" / "plain" / "test-0123abcd.jsonl"
  write_rows(path, [
    {"id": text, "sample": 0, "question": text, "completion": text, "answer": text,
     "correct": False, "extracted": text, "status": "ok"} for text in HOSTILE.values()
  ])  # fmt: skip
  return run
