"""Before anything is trained: every source is read, measured and graded, and mistakes are told."""

from __future__ import annotations

import dataclasses
import json

import pytest
from etils import epath

from igpo_jax import main
from igpo_jax.config import RewardConfig, default_config, freeze
from igpo_jax.data.lengths import Lengths, rounded
from igpo_jax.data.records import Record
from igpo_jax.data.sources import load_records
from igpo_jax.data.spans import find_answer_span
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.errors import UserError
from igpo_jax.rewards import registry
from igpo_jax.rewards.score import Scorer, Verdict, make_scorer
from igpo_jax.train import dry_run, golds, preflight, run, setup
from tests import tiny_config

ALPHABET = "".join(map(chr, range(32, 127))) + "\n"
TOKENIZER = CharTokenizer(ALPHABET)


@pytest.fixture(scope="module")
def scorer():
  with make_scorer(RewardConfig(workers=1)) as scorer:
    yield scorer


def record(k: int, trace: str, answer: str | None = None) -> Record:
  answer = str(k) if answer is None else answer
  trace = trace.replace("{k}", answer)
  prompt = ({"role": "user", "content": f"What is {k} + 0?"},)
  return Record(f"r/{k}", prompt, trace, answer, find_answer_span(trace, answer))


def records(trace: str, n: int = 10) -> list[Record]:
  return [record(k, trace) for k in range(n)]


def config_of(**options):
  """A config of the tiny run with options such as {"reward.verifier": "math"}."""
  config = tiny_config.get_config()
  for name, value in options.items():
    section, _, field = name.rpartition(".")
    setattr(getattr(config, section) if section else config, field, value)
  return freeze(config)


# --- golds ---


@pytest.mark.parametrize(
  "trace, counts, why",
  [
    ("It is {k}.\n#### {k}", (10, 0, 0), ""),
    ("so \\boxed{{k}}", (10, 0, 0), ""),
    ("The answer is {k}.", (10, 0, 0), ""),
    ("{k}", (0, 10, 0), "10 x no answer found, such as r/0: gold '0', found None"),
    ("Answer: {k}", (0, 10, 0), "no answer found"),
    ("It is {k}. \\boxed{x}", (0, 0, 10), "10 x another answer, such as r/0: gold '0', found 'x'"),
    ("so \\boxed{}", (0, 10, 0), "10 x no answer found, such as r/0: gold '0', found ''"),
  ],
)
def test_gold_traces_are_graded_as_the_policys_would_be(scorer, trace, counts, why):
  graded = golds.check_traces(records(trace), scorer, RewardConfig())
  assert (graded.passed, graded.unfound, graded.wrong) == counts
  assert (graded.graded, graded.traces, graded.late) == (10, 10, 0)
  assert graded.share == counts[0] / 10 and why in graded.why and bool(graded.why) == bool(why)
  assert f"gold traces that pass: {counts[0]} of 10" in str(graded)
  assert golds.from_json(json.loads(json.dumps(golds.as_json(graded)))) == graded


def test_bare_golds_are_an_error_with_remedies_that_were_tried(scorer):
  config = config_of(**{"reward.verifier": "math"})
  graded = golds.check_traces(records("{k}", 30), scorer, config.reward)
  with pytest.raises(UserError) as caught:
    preflight.check_floor(config, graded)
  line = str(caught.value)
  assert "'math' calls 0 of 30 gold traces correct, fewer than reward.gold_floor=0.5" in line
  assert "30 x no answer found" in line
  assert "reward.extraction='boxed,tag,hashes,phrase,last_number' (30 of 30" in line
  assert "&final=The answer is \\boxed{{answer}} in the source's URI (30 of 30" in line
  assert "reward.gold_floor=0.0 to train all the same" in line
  # And they help.
  rules = RewardConfig(extraction="boxed, tag,hashes,phrase,last_number", workers=1)
  with make_scorer(rules) as other:
    assert golds.check_traces(records("{k}", 30), other, rules).passed == 30
  ended = records("The answer is \\boxed{{k}}", 30)
  assert golds.check_traces(ended, scorer, RewardConfig()).passed == 30
  low = config_of(**{"reward.verifier": "math", "reward.gold_floor": 0.0})
  preflight.check_floor(low, graded)


def test_a_remedy_that_does_not_help_is_not_named(scorer):
  vague = [record(k, "no idea at all", "x+1") for k in range(5)]
  assert golds.check_traces(vague, scorer, RewardConfig()).remedies == ()
  exact = RewardConfig(verifier="exact")
  with make_scorer(exact) as other:
    graded = golds.check_traces(records("so {k}"), other, exact)
  assert graded.passed == 0 and len(graded.remedies) == 1
  assert "&final==> {answer}" in graded.remedies[0]


def test_some_failures_are_said_and_no_error(scorer):
  config = config_of(**{"reward.verifier": "math"})
  mixed = [*records("#### {k}", 6), *(record(k, "no idea") for k in range(6, 10))]
  graded = golds.check_traces(mixed, scorer, config.reward)
  assert graded.share == 0.6
  preflight.check_floor(config, graded)
  with pytest.raises(UserError, match=r"reward.gold_floor=0\.6 to train all the same"):
    preflight.check_floor(
      config_of(**{"reward.verifier": "math", "reward.gold_floor": 0.9}), graded
    )


def test_a_gold_that_does_not_equal_itself_is_named(scorer):
  rows = [record(k, "#### {k}", answer) for k, answer in enumerate(["1", "...", "2", "."])]
  graded = golds.check_answers(rows, scorer)
  assert graded.unequal == 2 and graded.examples == ("r/1: '...'", "r/3: '.'")
  assert "2 do not equal themselves and cannot be answered" in str(graded)
  assert golds.check_traces(rows, scorer, RewardConfig()).unequal == 2
  assert scorer.equal_themselves(["1", "...", "\\frac{1}{x}", "1"]) == [True, False, True, True]


def test_of_many_records_an_even_sample_is_graded(scorer):
  assert [r.id for r in golds.sampled(records("x", 10), 4)] == ["r/0", "r/3", "r/6", "r/9"]
  assert len(golds.sampled(records("x", 10), 10)) == 10 and golds.sampled([]) == []
  many = records("#### {k}", 2 * golds.MOST_GRADED)
  graded = golds.check_traces(many, scorer, RewardConfig())
  assert graded.graded == graded.passed == golds.MOST_GRADED
  assert "2,000 golds graded, evenly out of 4,000" in str(graded)


def test_records_without_traces_are_asked_for_their_golds_only(scorer):
  graded = golds.check_traces(records(""), scorer, RewardConfig())
  assert (graded.graded, graded.traces, graded.share) == (10, 0, 1.0)
  assert str(graded) == "10 golds graded"


@registry.register_verifier("never")
def _never(completion, record):
  return Verdict(False, completion, "ok")


@registry.register_verifier("never_golds", reads_golds=True)
def _never_golds(completion, record):
  return Verdict(False, completion, "ok")


@registry.register_verifier("raises")
def _raises(completion, record):
  raise KeyError("only for completions")


@registry.register_reward("counted")
def _counted(completion, record, verdict):
  raise AssertionError("a reward part was asked about a gold trace")


@pytest.mark.parametrize("verifier, held", [("never", False), ("never_golds", True),
                                            ("raises", False)])  # fmt: skip
def test_a_verifier_of_ones_own_is_held_to_the_floor_if_it_says_so(verifier, held):
  config = config_of(**{"reward.verifier": verifier, "reward.weights": (("counted", 1.0),)})
  with make_scorer(config.reward) as own:
    graded = golds.check_traces(records("#### {k}"), own, config.reward)
  if held:
    with pytest.raises(UserError, match="'never_golds' calls 0 of 10 gold traces correct"):
      preflight.check_floor(config, graded)
  else:
    preflight.check_floor(config, graded)
    assert ("0 of 10" if verifier == "never" else "not graded: KeyError") in str(graded)


def test_the_extraction_of_a_config_is_the_scorers(scorer):
  texts, rows = ["so 7", "#### 7"], [record(7, ""), record(7, "")]
  with make_scorer(RewardConfig(extraction="last_number", workers=1)) as loose:
    assert loose(texts, rows).correct.tolist() == [True, True]
  assert scorer(texts, rows).correct.tolist() == [False, True]
  with pytest.raises(UserError, match="no extraction rule 'guess'"):
    make_scorer(RewardConfig(extraction="boxed,guess"))


# --- lengths ---


def test_lengths_are_said_in_a_few_numbers():
  assert str(Lengths.of(range(1, 101))) == "median 50, 90% up to 90, 99% up to 99, longest 100"
  assert str(Lengths.of([16] * 9)) == "16 each" and str(Lengths.of([])) == "no"
  assert Lengths.of([3, 1, 2]).beyond(2) == 1
  assert [rounded(n) for n in (1, 13, 64, 65, 119, 448)] == [8, 16, 64, 128, 128, 448]


def stream_of(stage: str, rows, **options):
  config = config_of(**{"data.prompt_buckets": (24,), **options})
  make = {"sft": preflight.sft_stream, "rl": preflight.rl_stream}[stage]
  stream = make(config, TOKENIZER, rows)
  describe = {"sft": preflight.describe_sft, "rl": preflight.describe_rl}[stage]
  return "\n".join(describe(config, stream))


def test_what_is_left_out_is_said_with_the_option_that_keeps_it():
  long = Record("long", ({"role": "user", "content": "x" * 118},), "#### 1", "1", (0, 6))
  rows = [*records("#### {k}"), long, record(11, "y" * 99 + "#### {k}")]
  text = stream_of("sft", rows)
  assert "10 records, left out: 1 x prompt longer than the longest bucket, 1 x response too" in text
  assert "longest prompt 119 tokens, longest bucket 24: a bucket of 128 in data.prompt_b" in text
  assert "longest response 107 tokens with the one that ends it, longest length 16: 128 in" in text
  text = stream_of("rl", rows)
  assert "11 records, left out: 1 x prompt longer" in text and "longest prompt 119" in text
  assert "1 traces are longer than the canvas: hints come from their first 16 tokens" in text
  with pytest.raises(UserError, match="longest prompt 119 tokens, longest bucket 24: a bucket of"):
    stream_of("rl", [long])


@pytest.mark.parametrize("exploration", ["inpaint", "none"])
def test_a_policy_without_traces_to_inpaint_is_told_that_this_is_grpo(exploration):
  text = stream_of("rl", records(""), **{"rl.exploration": exploration})
  assert ("IGPO is plain GRPO here" in text) == (exploration == "inpaint")


def test_traces_that_are_missing_or_without_an_answer_are_counted():
  rows = [*records("#### {k}", 6), record(6, ""), record(7, "who knows?", "none")]
  text = stream_of("rl", rows)
  assert "1 records have no trace; used, but cannot be hinted" in text
  assert "the answer is found in 6 of 7 traces (85.7%); a hint may show it in the others" in text
  assert "broken" not in text
  broken = dataclasses.replace(rows[0], id="b", answer="\ufffd")
  assert "1 records have broken characters (U+FFFD)" in stream_of("rl", [*rows, broken])
  option = {"reward.extraction": "last_number", "hints.hide_answer_value": False}
  assert "set hints.hide_answer_value" in stream_of("rl", rows, **option)
  assert "set hints.hide_answer_value" not in stream_of("rl", rows, **option | {
    "hints.hide_answer_value": True})  # fmt: skip


# --- a run ---


def write_rows(path, rows) -> str:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return f"jsonl:{path}"


ROWS = [{"question": f"{k}+1=", "answer": str(k + 1), "trace": f"{k}+1;\n#### {k + 1}"}
        for k in range(8)]  # fmt: skip


def own_config(folder, **options):
  """A config on files: fine-tuning, RL, one benchmark."""
  (folder / "tok").mkdir(exist_ok=True)
  CharTokenizer("0123456789+=; #\n").save(folder / "tok")
  uri = write_rows(folder / "rows.jsonl", ROWS)
  config = tiny_config.get_config()
  config.data.tokenizer = str(folder / "tok")
  config.data.sft, config.data.rl, config.data.eval = uri, uri, (f"own={uri}",)
  config.reward.verifier = "math"
  config.reward.weights = (("correct", 1.0),)
  config.reward.workers = 1
  for name, value in options.items():
    section, _, field = name.rpartition(".")
    setattr(getattr(config, section) if section else config, field, value)
  return freeze(config)


@pytest.mark.parametrize(
  "options, line",
  [
    ({"data.rl": "{uri}?question=problem"}, "no row fits format=plain .*8 x no question"),
    ({"data.rl": "{uri}?trace=answer"}, "calls 0 of 8 gold traces correct"),
    ({"data.rl": "{uri}?template=What is {question}?"}, "the character 'W'"),
    ({"data.rl": "{uri}?limit=0"}, "no record"),
    ({"data.eval": ("own={uri}?answer=gold",)}, "no row fits format=plain .*8 x no answer"),
    ({"data.eval": ("own={uri}?template=What is {question}?",)}, "the character 'W'"),
    ({"data.prompt_buckets": (3,)}, "none of 8 records can be used: 8 x prompt longer"),
    ({"reward.extraction": "guess"}, "no extraction rule 'guess'"),
    ({"data.sft": "{uri}?trace=why"}, "none of 8 records can be used: 8 x empty trace"),
  ],
)
def test_a_mistake_in_any_source_shows_before_weights_are_made(
  tmp_path, monkeypatch, options, line
):
  def make_model(*args):
    raise AssertionError("weights were made before the sources were looked at")

  monkeypatch.setattr(run, "make_model", make_model)
  uri = f"jsonl:{tmp_path}/rows.jsonl"
  filled = {
    name: tuple(v.replace("{uri}", uri) if isinstance(v, str) else v for v in value)
    if isinstance(value, tuple)
    else value.replace("{uri}", uri)
    for name, value in options.items()
  }
  with pytest.raises(UserError, match=line):
    run.train(own_config(tmp_path, **filled), epath.Path(tmp_path / "run"))


def test_what_was_read_is_handed_to_the_stages_and_read_once(tmp_path, monkeypatch):
  config, read = own_config(tmp_path), []

  def load(uri, log=None):
    read.append(uri)
    return load_records(uri).records

  monkeypatch.setattr(preflight, "load_source", load)
  told = []
  with Scorer("exact") as exact:
    inputs = preflight.Inputs(config, setup.peek_tokenizer(config, tmp_path), exact, told.append)
  assert len(read) == 3
  assert inputs.records(config.data.eval[0].partition("=")[2]) and len(read) == 3
  assert len(inputs.take("sft")) == 8 and inputs.sft is None
  assert len(inputs.take("rl")) == 8 and inputs.rl is None
  assert "eval own: 8 problems; prompts in tokens: 5 each" in told


def test_a_dry_run_prints_the_plan_and_touches_nothing(tmp_path, monkeypatch, capsys):
  def make_model(*args):
    raise AssertionError("a dry run made weights")

  monkeypatch.setattr(run, "make_model", make_model)
  monkeypatch.setattr(setup, "make_model", make_model)
  config = own_config(tmp_path, **{"data.rl": f"jsonl:{tmp_path}/rows.jsonl?limit=5"})
  dry_run.dry_run(config, epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
  out, err = capsys.readouterr()
  assert "rl: 5 golds graded; gold traces that pass: 5 of 5 (100.0%)" in err
  for line in (
    "nothing is trained or written",
    "  reward.workers = 1 (default 2)",
    "  sft: 4 steps of 8 rows of up to 12+16 positions",
    "  rl: 6 steps of 2 prompts x 2 completions, 2 updates each; 12+16 positions, 4 denoising",
    "  eval own: 8 problems x 1 samples, 16 positions, 4 denoising steps; 4 time(s)",
    "parameters, 1 layers of width 16, vocabulary 19",
    "disk: checkpoints of about",
    "  rollout: ",
    "in all about ",
  ):
    assert line in out, line
  assert "rl.steps" not in out.partition("sizes:")[0].replace("rl.steps = 6", "")


def test_the_plan_names_exactly_the_options_that_were_changed():
  assert dry_run.differences(freeze(_untouched())) == [
    '  data.sft = "x:y" (default "")', '  data.rl = "x:y" (default "")',
  ]  # fmt: skip
  config = _untouched()
  config.sampler.threshold = 0.9
  config.rl.steps = 7
  lines = dry_run.differences(freeze(config))
  assert "  sampler.threshold = 0.9 (default null)" in lines
  assert "  rl.steps = 7 (default 100)" in lines and len(lines) == 4


def _untouched():
  config = default_config()
  config.data.sft = config.data.rl = "x:y"
  return config


def test_the_command_makes_a_dry_run(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(dry_run, "dry_run", lambda config, workdir: seen.append(workdir))
  for spelling in ("--dry-run", "--dry_run"):
    main.main(["--config=configs/quickstart.py:smoke", spelling, f"--workdir={tmp_path}/x"])
  assert seen == [epath.Path(tmp_path / "x")] * 2
