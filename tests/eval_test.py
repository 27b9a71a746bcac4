"""Evaluation: the protocols, and rows that are each made exactly once."""

from __future__ import annotations

import dataclasses
import types

import jax
import pytest
from etils import epath

from igpo_jax import grade, main
from igpo_jax.config import SamplerConfig, default_config, freeze
from igpo_jax.data.sources import load_records
from igpo_jax.data.tokenizer import CharTokenizer, train_sentencepiece
from igpo_jax.errors import UserError
from igpo_jax.eval import evaluate
from igpo_jax.eval.evaluate import (
  Evaluation,
  generate_rows,
  in_words,
  make_stream,
  problems_of,
)
from igpo_jax.eval.generations import params_digest
from igpo_jax.eval.protocols import PROTOCOLS, Setting, plan, register_protocol
from igpo_jax.io.versions import versions
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.rewards.score import Scorer
from igpo_jax.tasks.chains import ALPHABET
from tests.eval_rows import TASK, read, rows_file
from tests.paths import shared_path
from tests.tiny_lm import tiny_model

# Protocols.


def test_protocols_are_what_their_sources_say():
  def shape(s):
    return (s.sampler.gen_length, s.sampler.steps, s.sampler.block_length)

  d1, block, igpo = PROTOCOLS["d1"], PROTOCOLS["opencompass_block"], PROTOCOLS["igpo"]
  for name in ("gsm8k", "math500"):
    assert [shape(s) for s in d1[name]] == [(128, 64, 32), (256, 128, 32), (512, 256, 32)]
  assert [s.published for s in d1["gsm8k"]] == [0.693, 0.764, 0.781]
  assert [s.published for s in d1["math500"]] == [0.260, 0.324, 0.362]
  assert shape(block["gsm8k"][0]) == (256, 256, 8) and block["gsm8k"][0].published == 0.786
  assert shape(block["math500"][0]) == (512, 512, 64) and block["math500"][0].published == 0.422
  assert {n: s[0].published for n, s in igpo.items()} == {
    "gsm8k": 0.815, "math500": 0.390, "amc": 0.145, "minerva": 0.092}  # fmt: skip
  for name, (setting,) in igpo.items():
    expected = (16, 0.1) if name == "amc" else (1, 0.0)
    assert (setting.samples, setting.sampler.temperature) == expected
    assert shape(setting) == (256, 128, 32) and setting.ours
  every = [s for p in PROTOCOLS.values() for settings in p.values() for s in settings]
  assert all(s.source and s.rules and "{question}" in s.template for s in every)


def test_prefill_is_the_beginning_of_the_answer_and_examples_are_turns():
  d1 = PROTOCOLS["d1"]["gsm8k"][0].messages("How many?")
  assert [m["role"] for m in d1] == ["user", "assistant"]
  assert d1[0]["content"].endswith("\n\nHow many?") and d1[1]["content"] == "<reasoning>"
  (example,) = load_records(TASK, n=1).records
  turns = PROTOCOLS["opencompass_block"]["gsm8k"][0].messages("How many?", (example,))
  assert [m["role"] for m in turns] == ["user", "assistant", "user"]
  assert example.question in turns[0]["content"] and turns[1]["content"] == example.trace
  assert turns[2]["content"] == "Question: How many?\nLet's think step by step\nAnswer:"


@pytest.mark.parametrize(
  ("benchmark", "boxed", "end"),
  [
    # A space after the sentence; the other has a quotation mark, a space and a line at the end.
    ("gsm8k", "\\boxed{}. \nRespond", "</answer>\n\nHow many?"),
    ("math500", "\\boxed{}.\nRespond", '</answer>" \n\n\nHow many?'),
  ],
)
def test_d1_has_a_prompt_for_each_benchmark(benchmark, boxed, end):
  """To the letter: a model's accuracy hangs on such things (eval/gsm8k.py, eval/math500.py)."""
  for setting in PROTOCOLS["d1"][benchmark]:
    user, _ = setting.messages("How many?")
    assert boxed in user["content"] and user["content"].endswith(end)


def eval_config(*items, **options):
  config = default_config()
  config.stages = ("eval",)
  config.data.eval = items
  for name, value in options.items():
    config.eval[name] = value
  return config


def test_evaluations_are_exact_unless_a_cache_is_asked_for():
  """Whatever the rollouts use; with a protocol as without."""
  config = eval_config(f"gsm8k={TASK}")
  config.sampler.cache, config.sampler.refresh_every = "dual", 4
  for protocol in ("", "igpo"):
    config.eval.protocol = protocol
    for cache in ("none", "prefix"):
      config.eval.cache = cache
      (task,) = plan(freeze(config))
      assert task.setting.sampler.cache == cache
  config.eval.protocol = ""
  assert task.setting.sampler.refresh_every == 0  # the protocol's
  assert plan(freeze(config))[0].setting.sampler.refresh_every == 4
  # Parallel commits are the rollouts', unless they are switched off.
  config.eval.cache, config.sampler.adaptive, config.sampler.factor = "none", True, 1.0
  assert plan(freeze(config))[0].setting.sampler.factor == 1.0
  config.eval.parallel = False
  (task,) = plan(freeze(config))
  exact = dataclasses.replace(freeze(config).sampler, cache="none", refresh_every=0, factor=None,
                              adaptive=False, temperature=0.0)  # fmt: skip
  assert task.setting.sampler == exact
  with pytest.raises(UserError, match=r"eval\.temperature and eval\.parallel"):
    config.eval.protocol = "igpo"
    freeze(config)


def test_a_plan_names_every_length_once():
  config = eval_config(f"gsm8k={TASK}", f"math500={TASK}", protocol="d1")
  assert [task.name for task in plan(freeze(config))] == [
    "gsm8k@128", "gsm8k@256", "gsm8k@512", "math500@128", "math500@256", "math500@512",
  ]  # fmt: skip
  config.eval.lengths = (256,)
  assert [task.name for task in plan(freeze(config))] == ["gsm8k@256", "math500@256"]


def test_a_protocol_of_a_users_own_is_planned_and_named_among_those_there_are():
  short, long = (
    Setting(SamplerConfig(gen_length=length, block_length=8, steps=8), template="{question}!")
    for length in (8, 16)
  )
  register_protocol("mine", {"gsm8k": (short, long), "amc23": short})
  config = eval_config(f"gsm8k={TASK}", f"amc={TASK}", protocol="mine")
  assert [task.name for task in plan(freeze(config))] == ["gsm8k@8", "gsm8k@16", "amc"]
  assert plan(freeze(config))[2].setting.messages("1+1")[0]["content"] == "1+1!"
  config.eval.protocol = "yours"
  with pytest.raises(UserError, match="is not one of igpo, d1, opencompass_block, mine"):
    plan(freeze(config))
  for name in ("mine", "igpo", "plain", ""):
    with pytest.raises(ValueError, match=r"already registered|reserved"):
      register_protocol(name, {"gsm8k": short})
  with pytest.raises(ValueError, match=r"gsm8k: one setting for each length, not \[8, 8\]"):
    register_protocol("twice", {"gsm8k": (short, short)})
  with pytest.raises(ValueError, match="defines no benchmark"):
    register_protocol("none", {})


@pytest.mark.parametrize(
  ("items", "options", "message"),
  [
    ([f"gsm8k={TASK}"], {"protocol": "lm_eval"}, "'lm_eval' is not one of igpo, d1"),
    ([f"test={TASK}"], {"protocol": "igpo"}, "defines gsm8k, math500, amc, minerva, not 'test'"),
    ([f"amc={TASK}"], {"protocol": "d1"}, "defines gsm8k, math500, not 'amc'"),
    ([f"gsm8k={TASK}"], {"protocol": "d1", "lengths": (1024,)}, "runs gsm8k: 128, 256, 512"),
    ([f"gsm8k={TASK}"], {"lengths": (128,)}, r"eval.lengths=\(128,\) needs eval.protocol"),
    ([f"gsm8k={TASK}"], {"protocol": "d1", "temperature": 0.7}, "eval.protocol='d1' decides"),
    ([f"gsm8k={TASK}"], {"protocol": "d1", "samples": 4}, "eval.protocol='d1' decides"),
    (["gsm8k=jsonl:x?template=a{question}"], {"protocol": "igpo"}, "no system or template"),
    ([f"gsm8k={TASK}"], {"protocol": "d1", "examples": ("gsm8k=jsonl:x",)}, "no benchmark"),
    ([f"gsm8k={TASK}"], {"examples": ("gsm8k=jsonl:x",)}, "no benchmark"),
    ([f"a b={TASK}"], {}, "should be letters"),
    ([f"a={TASK}", f"b={TASK}", f"a={TASK}"], {}, "data.eval names a benchmark twice: a$"),
    ([f"a={TASK}"], {"samples": 0}, "eval.samples=0 must be at least 1"),
  ],
)
def test_an_evaluation_that_cannot_be_is_told_before_any_work(items, options, message):
  with pytest.raises(UserError, match=message):
    main.check_inputs(freeze(eval_config(*items, **options)))


# Rows.


class Interrupted(Exception):
  """Stands for a kill between two batches."""


def run_evaluation(directory, setting=None, n=13, batch_size=4, label="init", stop_after=None,
                   params=None, uri=TASK, buckets=(12,), begun=None):  # fmt: skip
  """Evaluates the tiny model on n synthetic problems; returns its metrics and the file."""
  lm, own = tiny_model(3 + len(ALPHABET))
  config = eval_config(f"test={uri}&n={n}", batch_size=batch_size)
  config.reward.verifier = "exact"
  config.data.prompt_buckets = buckets
  config.sampler.gen_length, config.sampler.block_length, config.sampler.steps = 12, 6, 4
  config = freeze(config)
  (task,) = plan(config)
  if setting:
    changes = dict(setting)
    sampler = dataclasses.replace(task.setting.sampler, temperature=changes.pop("temperature", 0.0))
    task = task._replace(setting=dataclasses.replace(task.setting, sampler=sampler, **changes))

  def progress(left, name):
    for done, number in enumerate(left):
      if done == stop_after:
        raise Interrupted
      if begun is not None:
        begun(number)
      yield number

  mesh = make_mesh()
  with jax.set_mesh(mesh), Scorer("exact") as scorer:
    evaluation = Evaluation(
      config, [task], lm, CharTokenizer(ALPHABET), scorer, mesh, jax.random.key(7),
      epath.Path(directory), lambda u: load_records(u).records, progress,
    )  # fmt: skip
    result = evaluation(own if params is None else params, label)["test"]
  return result, rows_file(directory)


WARM = {"temperature": 1.0, "samples": 3}


@pytest.mark.slow
def test_every_problem_is_made_once_in_order_whatever_the_tail(tmp_path):
  wanted = [record.id for record in load_records(TASK, n=13).records]
  for batch_size in (4, 13):
    result, path = run_evaluation(tmp_path / str(batch_size), batch_size=batch_size)
    assert [row["id"] for row in read(path)] == wanted and result["n"] == 13
  _, path = run_evaluation(tmp_path / "warm", WARM)
  assert [(row["id"], row["sample"]) for row in read(path)] == [
    (name, sample) for name in wanted for sample in range(3)
  ]


def test_the_settings_of_an_evaluation_are_equal_where_its_completions_are(tmp_path):
  def words(**options):
    return in_words(Setting(SamplerConfig(gen_length=8, block_length=4, steps=8, **options)))

  assert words() == (
    "gen_length=8, block_length=4, steps=8, temperature=0.0, remasking=low_confidence,"
    " cfg_scale=0.0, refresh_every=0, early_stop=row"
  )
  others = ({"temperature": 0.5}, {"threshold": 0.9}, {"early_stop": "none"}, {"allow_mask": True})
  assert len({words(), *(words(**other) for other in others)}) == 5
  result, _ = run_evaluation(tmp_path, WARM)
  assert "temperature=1.0" in result["settings"] and result["cache"] == "none"


@pytest.mark.slow
def test_rows_do_not_depend_on_the_batch_or_on_other_samples(tmp_path):
  _, path = run_evaluation(tmp_path / "a", WARM, batch_size=4)
  _, other = run_evaluation(tmp_path / "b", WARM, batch_size=7)
  assert read(path) == read(other)
  assert len({row["completion"] for row in read(path)}) > 13  # noise of its own for each
  _, single = run_evaluation(tmp_path / "c", {"temperature": 1.0})
  assert read(single) == [row for row in read(path) if row["sample"] == 0]


def test_the_progress_of_a_round_begins_before_it_is_made(tmp_path, monkeypatch):
  """Else the time that is shown is not the time that it took. No slot is empty while rows wait."""
  events, counts = [], []

  def watched(*args):
    for rows in generate_rows(*args[:-1], counts.append):
      events.append("made")
      yield rows

  monkeypatch.setattr(evaluate, "generate_rows", watched)
  run_evaluation(tmp_path, batch_size=4, begun=events.append)
  assert events == [0, "made", 1, "made", 2, "made", 3, "made"]
  assert 0 < counts[0].worked == counts[0].room and counts[0].positions >= 13 * 16


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["between", "in a batch", "in a row", "in the first row"])
def test_a_killed_evaluation_continued_equals_an_uninterrupted_one(tmp_path, cut):
  expected, whole = run_evaluation(tmp_path / "whole", WARM)
  with pytest.raises(Interrupted):
    run_evaluation(tmp_path / "cut", WARM, stop_after=3)
  path = rows_file(tmp_path / "cut")
  rows = path.read_text().splitlines(keepends=True)
  assert 0 < len(rows) < 39
  # What a kill may leave of what was being appended.
  kept = {
    "between": "".join(rows),
    "in a batch": "".join(rows[:10]),
    "in a row": "".join(rows[:10]) + rows[10][:20],
    "in the first row": rows[0][:30],
  }[cut]
  path.write_text(kept)
  result, path = run_evaluation(tmp_path / "cut", WARM)
  assert path.read_bytes() == whole.read_bytes() and result == expected


@pytest.mark.slow
def test_a_result_says_on_what_it_was_made_however_often_it_was_continued(tmp_path, monkeypatch):
  with pytest.raises(Interrupted):
    run_evaluation(tmp_path, stop_after=2)
  other = {"igpo_jax": "9.9", "jax": "8.8"}
  monkeypatch.setattr(evaluate, "versions", lambda: other)
  result, path = run_evaluation(tmp_path, batch_size=7)
  again, _ = run_evaluation(tmp_path, batch_size=13)  # which makes no row
  assert result == again
  told = {name: result[name] for name in ("devices", "dtype", "batch_size", "cache", "versions")}
  assert told == {
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "dtype": "float32",
    "batch_size": "4; 7", "cache": "none",
    "versions": f"{', '.join(f'{k} {v}' for k, v in versions().items())}; igpo_jax 9.9, jax 8.8",
  }  # fmt: skip
  path.with_suffix("").with_suffix(".made.json").unlink()  # as earlier versions left it
  assert run_evaluation(tmp_path)[0]["versions"] == "not recorded"


def test_a_hash_of_the_prompts_changes_with_what_the_model_reads_and_with_nothing_else():
  def digest(template="{question}", batch_size=4, n=5, alphabet=ALPHABET):
    records = load_records(f"{TASK}&n={n}").records
    problems = problems_of(Setting(SamplerConfig(), samples=1, template=template), records)
    stream = make_stream(problems, CharTokenizer(alphabet), batch_size, (12,), make_mesh())
    return stream.prompts_digest()

  assert digest() == digest(batch_size=2)
  others = (digest("{question}="), digest(n=4), digest(alphabet=ALPHABET[::-1]))
  assert len({digest(), *others}) == 4


def test_a_finished_evaluation_is_not_made_again(tmp_path):
  expected, path = run_evaluation(tmp_path)
  written = path.stat().st_mtime_ns, path.read_bytes()
  result, _ = run_evaluation(tmp_path, stop_after=0)  # no batch is left that could stop it
  assert result == expected and path.read_bytes() == written[1]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["weights", "problems", "setting"])
def test_rows_of_another_evaluation_are_neither_continued_nor_lost(tmp_path, change):
  _, params = tiny_model(3 + len(ALPHABET))
  _, first = run_evaluation(tmp_path, WARM)
  kept = first.read_bytes()
  options = {
    "weights": {"params": jax.tree.map(lambda x: -x, params), "setting": WARM},
    "problems": {"uri": TASK + "&digits=2", "setting": WARM},
    "setting": {"setting": {"temperature": 2.0, "samples": 3}},
  }[change]
  _, expected = run_evaluation(tmp_path / "alone", **options)
  _, path = run_evaluation(tmp_path, **options)
  assert path.read_bytes() == expected.read_bytes() != kept
  assert first.read_bytes() == kept and path != first


@pytest.mark.slow
def test_weights_have_a_name_of_their_own():
  _, params = tiny_model(9)
  names = {params_digest(params)}
  leaves, tree = jax.tree.flatten(params)
  names.add(params_digest(jax.tree.unflatten(tree, [leaves[0].at[0].add(1e-6), *leaves[1:]])))
  # One bit up and one bit down leave the sum of all bits as it was.
  moved = leaves[1].at[..., 0].set(leaves[1][..., 1]).at[..., 1].set(leaves[1][..., 0] + 1e-7)
  names.add(params_digest(jax.tree.unflatten(tree, [leaves[0], moved, *leaves[2:]])))
  names.add(params_digest(jax.tree.map(lambda x: x.astype("bfloat16"), params)))
  assert len(names) == 4
  assert params_digest(jax.tree.map(lambda x: x + 0, params)) in names


def test_a_long_prompt_gets_a_bucket_and_nothing_is_left_out():
  records = load_records(TASK, n=5).records
  long = dataclasses.replace(
    records[0], id="long", prompt=({"role": "user", "content": "1" * 100},)
  )
  setting = Setting(freeze(eval_config()).sampler, samples=2)
  problems = problems_of(setting, [*records, long])
  stream = make_stream(problems, CharTokenizer(ALPHABET), 4, (12, 16), make_mesh())
  assert len(stream) == 12 and stream.dropped == {}
  batches = list(stream.ordered_batches())
  assert [batch.tokens.shape[1] for batch in batches] == [128, 12, 12]  # longest first
  # problems of equal length stay in their order, a problem's samples together
  longest_first = sorted(problems, key=lambda p: -len(p.record.prompt[0]["content"]))
  asked = [record.id for batch in batches for record in batch.records]
  assert asked == [p.asked.id for p in longest_first] and asked[:2] == ["long", "long#sample1"]


@pytest.mark.slow
def test_batches_of_like_length_give_the_rows_and_the_file_of_one_batch(tmp_path):
  """13 problems of two lengths, 3 samples each: shuffled by length, and put in order at the end."""
  expected, whole = run_evaluation(tmp_path / "whole", WARM, batch_size=64)
  with pytest.raises(Interrupted):
    run_evaluation(tmp_path / "sorted", WARM, stop_after=4, buckets=(8, 12))
  lengths = [len(row["question"]) > 6 for row in read(rows_file(tmp_path / "sorted"))]
  assert lengths == sorted(lengths, reverse=True) and 12 < len(lengths) < 39
  result, path = run_evaluation(tmp_path / "sorted", WARM, buckets=(8, 12))
  assert path.read_bytes() == whole.read_bytes()
  assert result == expected | {"batch_size": "4"}
  lengths = [len(row["question"]) for row in read(path)]
  assert lengths != sorted(lengths, reverse=True)


@pytest.mark.parametrize(("rows", "batch_size", "expected"), [(13, 4, 8), (13, 64, 16), (3, 8, 8)])
def test_a_batch_is_shared_evenly_by_the_devices(rows, batch_size, expected):
  records = load_records(TASK, n=rows).records
  problems = problems_of(Setting(freeze(eval_config()).sampler), records)
  mesh = types.SimpleNamespace(shape={"data": 4, "fsdp": 2, "tensor": 3})
  stream = make_stream(problems, CharTokenizer(ALPHABET), batch_size, (12,), mesh)
  assert stream.batch_size == expected
  assert sum(batch.real.sum() for batch in stream.ordered_batches()) == rows


def test_rows_are_read_by_grade_with_the_same_verdicts(tmp_path):
  _, path = run_evaluation(tmp_path, WARM, uri=TASK.replace("max_steps=2", "max_steps=1"))
  out = tmp_path / "graded.jsonl"
  # The task's own verifier looks for "=>", grade's for what the benchmarks use.
  with Scorer("exact") as scorer:
    counts = grade.grade(path, out, scorer)
  assert counts["rows"] == counts["agree"] == 39
  assert [(r["extracted"], r["status"]) for r in read(out)] == [
    (r["extracted"], r["status"]) for r in read(path)
  ]


# Real questions.

FILES = {"gsm8k": ("gsm8k", "gsm8k"), "math500": ("math500", "math"), "amc": ("amc23", "amc"),
         "minerva": ("minerva_math", "minerva")}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_real_questions_go_through_every_protocol(tmp_path, protocol):
  items, texts = [], []
  for name in PROTOCOLS[protocol]:
    folder, kind = FILES[name]
    uri = f"jsonl:{shared_path('data', folder, 'test.jsonl')}?format={kind}"
    items.append(f"{name}={uri}")
    texts += [r.question for r in load_records(uri, limit=40).records]
  config = eval_config(*items, protocol=protocol, limit=1)
  config.reward.workers = 1
  config = freeze(config)
  tokenizer = train_sentencepiece(texts, 500)
  lm, params = tiny_model(tokenizer.vocab_size)
  lm = lm._replace(mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id,
                   stop_ids=tokenizer.stop_ids)  # fmt: skip
  mesh = make_mesh()
  with jax.set_mesh(mesh), Scorer("exact") as scorer:
    evaluation = Evaluation(
      config, plan(config), lm, tokenizer, scorer, mesh, jax.random.key(0),
      epath.Path(tmp_path), lambda uri: load_records(uri).records,
    )  # fmt: skip
    results = evaluation(params, "init")
  assert {name.partition("@")[0] for name in results} == set(PROTOCOLS[protocol])
  for name, result in results.items():
    assert result["protocol"] == protocol and result["n"] == 1 and result["published"] > 0
    path = rows_file(tmp_path, f"init/{protocol}", name)
    assert len(read(path)) == result["samples"]
    # As grade reads them, with the protocol's own rules for finding the answer.
    setting = next(t.setting for t in evaluation.tasks if t.name == name)
    with Scorer("math", workers=1, rules=setting.rules) as judge:
      counts = grade.grade(path, tmp_path / "out.jsonl", judge)
    assert counts["agree"] == counts["rows"] == result["samples"]
