"""Looking at a run: its files in every state, the page's data, the terminal; hostile texts."""

from __future__ import annotations

import html
import html.parser
import io
import itertools
import json
import re

import pytest
from etils import epath

from igpo_jax import report, show
from igpo_jax.errors import UserError
from igpo_jax.viewer import collect, files, notebook, page, terminal, text
from tests import fake_gcs
from tests.sample_runs import HOSTILE, LENGTH, hostile_run, make_run, samples, write_rows

HARMLESS = {"\n", "\r", " "}


def runs_in(tmp_path, *names):
  return [epath.Path(make_run(tmp_path / name, seed=k)) for k, name in enumerate(names)]


# --- files -----------------------------------------------------------------------------------


def test_rows_of_version_1_are_read_and_newer_ones_refused(tmp_path):
  (run,) = runs_in(tmp_path, "old")
  rows = [
    {k: v for k, v in row.items() if k not in (*files.ADDED, "version", "token_stats")}
    for row in samples((1,))
  ]
  write_rows(run / "samples.jsonl", rows)
  (first, *_) = files.sample_rows(run)
  assert first["completion"] == rows[0]["completion"] and first["tokens"] is None
  drawn = terminal.draw_row(first)  # the text stands for the tokens
  console = terminal.make_console(io.StringIO())
  console.print(drawn)
  assert rows[0]["completion"] in console.file.getvalue()
  write_rows(run / "samples.jsonl", [samples((1,))[0] | {"version": 3}])
  with pytest.raises(UserError, match="rows of version 3; this program reads up to 2"):
    files.sample_rows(run)


def test_a_line_that_is_being_written_is_left_out_and_a_broken_one_is_told(tmp_path):
  path = epath.Path(tmp_path / "samples.jsonl")
  assert list(files.each_row(path)) == []
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert [row["step"] for row in files.each_row(path)] == [1, 2]
  path.write_text('{"step": 1}\nnot a row\n{"step": 2}\n')
  with pytest.raises(UserError, match="line 2: not a row"):
    list(files.each_row(path))


def test_what_follows_a_run_sees_each_row_once_and_bears_that_it_is_continued(tmp_path):
  path = epath.Path(tmp_path / "metrics.jsonl")
  follower = files.Follower(path)
  assert follower.new_rows() == []
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert [row["step"] for row in follower.new_rows()] == [1, 2]
  path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
  assert [row["step"] for row in follower.new_rows()] == [3] and follower.new_rows() == []
  path.write_text('{"step": 1}\n')  # continued from step 1
  assert follower.new_rows() == []
  with path.open("a") as file:
    file.write('{"step": 2}\n')
  assert [row["step"] for row in follower.new_rows()] == [2]


def test_a_run_on_an_object_store_is_read_with_its_parts(tmp_path, monkeypatch):
  fake_gcs.install(monkeypatch, tmp_path)
  local = make_run(tmp_path / "bucket" / "run")
  lines = (local / "samples.jsonl").read_text().splitlines(keepends=True)
  (local / "samples.jsonl").unlink()
  for number, part in enumerate((lines[:5], lines[5:])):
    (local / f"samples-{number:05d}.jsonl").write_text("".join(part))
  run = files.open_run("gs://bucket/run")
  follower = files.Follower(run / "samples.jsonl")
  assert len(files.sample_rows(run)) == len(follower.new_rows()) == len(lines)
  (local / "samples-00002.jsonl").write_text(lines[0])
  assert len(follower.new_rows()) == 1
  assert report.main(["--workdir=gs://bucket/run"]) is None
  assert (local / "report.html").read_text().count("<script") == 1 + len(page.SCRIPTS)
  (data,) = collect.collect([run])["runs"]
  assert len(data["samples"]) == len(lines) + 1 and len(data["items"]["test"]["labels"]) == 3


# --- texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_can_act_on_a_terminal_or_hide(name):
  seen = text.visible(HOSTILE[name])
  assert all(c.isprintable() or c == "\u200d" for c in seen)
  assert seen.encode()  # no half characters
  assert text.visible("x⏎ naïve 🙂") == "x⏎ naïve 🙂"


class Scripts(html.parser.HTMLParser):
  """Collects the elements of a page, and the contents of its scripts."""

  def __init__(self):
    super().__init__()
    self.tags, self.scripts, self.handlers = [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.handlers += [name for name, _ in attrs if name.startswith("on")]
    if tag == "script":
      self.scripts.append("")

  def handle_endtag(self, tag):
    self.tags.append(f"/{tag}")

  def handle_data(self, data):
    if self.tags[-1:] == ["script"]:
      self.scripts[-1] += data


def test_no_text_can_leave_the_data_of_a_page(tmp_path):
  run = epath.Path(hostile_run(tmp_path / "</title><script>x"))
  made = page.make_page([run])
  assert len(made) < 1_000_000, "a text of a megabyte is cut"
  parsed = Scripts()
  parsed.feed(made)
  assert len(parsed.scripts) == 1 + len(page.SCRIPTS) and not parsed.handlers
  assert not {"img", "b"} & set(parsed.tags)
  data = json.loads(parsed.scripts[0])
  rows = {row["prompt"][:8]: row for row in data["runs"][0]["samples"]}
  for name, hostile in HOSTILE.items():
    assert rows[hostile[:8]]["completion"][:4000] == hostile[:4000], name
  assert made.isascii() or not re.search("[\u202a-\u202e\u2066-\u2069]", made)
  for script in parsed.scripts[1:]:
    assert f"'sha256-{page._hash(script)}'" in html.unescape(made[:5000]), (
      "the policy lets its scripts run"
    )


def test_numbers_that_json_does_not_have_are_no_reason_to_have_no_page(tmp_path):
  nan, inf = float("nan"), float("inf")
  rows = [samples((1,))[0] | {"reward": nan, "parts": {"mine": inf}, "advantage": -inf}]
  run = epath.Path(make_run(tmp_path / "run", rows=rows))
  write_rows(run / "metrics.jsonl", [{"stage": "rl", "step": 1, "rl/mine": inf, "rl/kl": 0.5}])
  parsed = Scripts()
  parsed.feed(page.make_page([run]))
  strict = lambda name: pytest.fail(f"{name} is no JSON")
  (data,) = json.loads(parsed.scripts[0], parse_constant=strict)["runs"]
  assert data["samples"][0]["reward"] is None and data["samples"][0]["parts"] == {"mine": None}
  assert list(data["curves"]["rl"]) == ["rl/kl"]


def test_a_notebook_gets_the_page_in_a_frame_of_its_own(tmp_path):
  run = hostile_run(tmp_path / "run")
  shown = notebook.Viewer(run)._repr_html_()
  assert shown.count("<") == 2 and 'sandbox="allow-scripts"' in shown
  assert "data-section=&quot;rollouts&quot;" in shown


# --- the page's data -----------------------------------------------------------------------


def test_a_page_takes_of_a_long_run_what_fits_and_says_so(tmp_path, monkeypatch):
  steps = range(1, 201)
  run = make_run(tmp_path / "long", steps=3000, rows=samples(steps))
  monkeypatch.setattr(collect, "SAMPLE_BYTES", 60_000)
  monkeypatch.setattr(collect, "ITEM_BYTES", 500)
  (data,) = collect.collect([epath.Path(run)])["runs"]
  assert len(json.dumps(data["samples"])) <= 60_000 * 1.05
  kept = sorted({row["step"] for row in data["samples"]})
  assert kept[0] == 1 and kept[-1] == 200 and len(kept) > 5
  assert max(b - a for a, b in itertools.pairwise(kept)) < 2.5 * 200 / len(kept)
  assert all(sum(row["step"] == step for row in data["samples"]) == 6 for step in kept)
  assert any(f"{len(data['samples'])} of 1,200 rows" in note for note in data["notes"])
  assert any("items of evaluations are here" in note for note in data["notes"])
  loss = data["curves"]["sft"]["sft/loss"]
  assert len(loss["x"]) <= collect.POINTS and loss["mean_of"] == 3 and loss["x"][-1] == 3000
  assert loss["y"][0] == pytest.approx((3 / 1 + 3 / 2 + 3 / 3) / 3, rel=1e-4)


def test_a_small_run_is_on_the_page_as_a_whole(tmp_path):
  (run,) = runs_in(tmp_path, "run")
  (data,) = collect.collect([run])["runs"]
  assert data["notes"] == [] and len(data["samples"]) == len(samples())
  assert data["samples"][0]["token_stats"]["kept"][0] is False
  assert [p["accuracy"] for p in data["evals"]["test"]] == [0.25, 0.5, 0.75]
  assert [p["x"] for p in data["evals"]["test"]] == [0, 20, 40]
  rate = data["curves"]["rl"]["time/tokens_per_second"]["y"][0]
  wrong = data["curves"]["rl"]["rl/all_wrong_before"]["y"][0]
  assert rate == pytest.approx(8 * 8 * (1 + wrong) * 6 / 0.5, rel=1e-3)
  items = data["items"]["test"]
  assert items["labels"] == ["init", "sft-20", "rl-20"]
  assert [item["changed"] for item in items["items"]] == [True, True, True, False]
  differing = {name: (value, default) for name, value, default in data["config"]}
  assert differing["rl.steps"] == (20, 100) and "resolved.devices" not in differing


def test_runs_that_differ_by_their_seed_alone_are_a_band(tmp_path):
  one, two = runs_in(tmp_path, "one", "two")
  other = epath.Path(make_run(tmp_path / "other", seed=5, steps=21))
  (band,) = collect.collect([one, other, two])["bands"]
  assert band["runs"] == [0, 2]


def test_runs_with_one_name_are_told_apart(tmp_path):
  names = [run["name"] for run in collect.collect(runs_in(tmp_path, "a/run", "b/run"))["runs"]]
  assert names == ["a/run", "b/run"]


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
  (run,) = runs_in(tmp_path, "run")
  for name in ("metrics.jsonl", "samples.jsonl"):
    (run / name).unlink()
  report.main([f"--workdir={run}"])
  assert "<html" in (run / "report.html").read_text()


# --- commands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("words", "line"),
  [
    (["--workdir={}/nowhere"], "--workdir={}/nowhere: no such directory"),
    (["--workdir={}"], "holds no run"),
    (["--workdir={}/a", "--workdir={}/b"], "--output is missing"),
    (["--workdir={}/a", "--workdir={}/a", "--output=x"], "a run is there twice"),
    (["--workdir={}/a", "--output={}/no/x.html"], "there is no folder"),
  ],
)
def test_a_report_that_cannot_be_made_is_one_line(words, line, tmp_path):
  runs_in(tmp_path, "a", "b")
  with pytest.raises(UserError) as error:
    report.main([word.replace("{}", str(tmp_path)) for word in words])
  assert line.replace("{}", str(tmp_path)) in str(error.value)


def shown_by(capsys, *words):
  show.main(list(map(str, words)))
  return capsys.readouterr().out


def test_show_draws_the_last_step_with_hints_order_and_verdicts(tmp_path, capsys):
  (run,) = runs_in(tmp_path, "run")
  out = shown_by(capsys, run)
  assert "step 2, group 0: hinted 1, inserted for own 0" in out and "step 1," not in out
  assert "⟦12=>7⟧7<eos>|<eos>" in out, "hints are marked without colours, blocks are parted"
  assert "right  answer '7'  gold '7'  (the answer is right)  reward 1  advantage +0.5" in out
  out = shown_by(capsys, run, "--step=1", "--id=p1", "--number=0", "--order")
  assert "question 1" in out and "question 0" not in out
  canvases = [line[12:].rstrip(" │") for line in out.splitlines() if "  step " in line]
  assert canvases[0].startswith("░>7░") or canvases[0].startswith("░=>7░")
  assert len(canvases) == LENGTH
  for words, line in (
    (["--step=9"], "steps in .*: 1, 2"),
    (["--id=nobody"], "no completion fits"),
  ):
    with pytest.raises(UserError, match=line):
      show.main([str(run), *words])
  (run / "samples.jsonl").unlink()
  with pytest.raises(UserError, match="has no row yet"):
    show.main([str(run)])


def test_watching_prints_what_is_new(tmp_path):
  (run,) = runs_in(tmp_path, "run")
  console = terminal.make_console(io.StringIO())
  args = show.make_parser().parse_args([str(run), "--watch", "--limit=1"])

  def when():
    yield
    first = console.file.getvalue()
    assert "rl 20: " in first and "eval/test/accuracy 0.75" in first and "step 2, group 0" in first
    with (run / "metrics.jsonl").open("a") as file:
      file.write('{"stage": "rl", "step": 21, "rl/reward": 0.125}\n{"stage"')
    with (run / "samples.jsonl").open("a") as file:
      file.writelines(json.dumps(row) + "\n" for row in samples((3,)))
    yield
    new = console.file.getvalue()[len(first) :]
    assert "rl 21: rl/reward 0.125" in new and "step 3, group 0" in new and "rl 20" not in new
    yield
    assert console.file.getvalue()[len(first) + len(new) :] == ""

  show.watch(run, args, console, when())


@pytest.mark.parametrize("name", HOSTILE)
def test_show_draws_any_text(name, tmp_path, capsys):
  hostile = HOSTILE[name]
  rows = [row | {"completion": hostile, "prompt": hostile, "answer": hostile, "id": hostile,
                 "extracted": hostile, "reason": hostile, "pieces": [hostile] * LENGTH}
          for row in samples((1,))]  # fmt: skip
  run = make_run(tmp_path / "run", rows=rows)
  out = shown_by(capsys, run, "--limit=1")
  assert all(c.isprintable() or c in HARMLESS or c == "\u200d" for c in out)
