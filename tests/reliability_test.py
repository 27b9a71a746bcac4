"""A small part of the campaigns of benchmarks/reliability, with another seed each time."""

from __future__ import annotations

import random
import time

import pytest
from etils import epath

from benchmarks.reliability import disks, dtypes, graders, inputs, nonfinite
from benchmarks.reliability.table import Campaign, carry_out, table
from igpo_jax.io.jsonl import row_file

SEED = random.SystemRandom().randrange(10**6)
PARTS = {
  graders.CAMPAIGN: ("near/0", "soup/1", "corpus/2"),
  disks.CAMPAIGN: ("flip/0", "flip/1", "flip/2", "flip/3", "cut/0", "zeros/0", "missing/0",
                   "leftover/0", "tail/0", "rename/0", "full/0", "gone/0"),
  inputs.CAMPAIGN: ("model/0", "adapter/0", "training/0", "data/0", "options/0"),
  nonfinite.CAMPAIGN: ("gradient/0",),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's
@pytest.mark.parametrize("campaign", PARTS, ids=lambda campaign: campaign.name)
def test_nothing_is_lost_whatever_the_seed(campaign, tmp_path, capsys):
  for case in PARTS[campaign]:
    again = f"python -m benchmarks.reliability --only={campaign.name} --case={case} --seed={SEED}"
    folder = epath.Path(tmp_path / case.replace("/", "-"))
    folder.mkdir()
    found = campaign.attempt(case, SEED, folder)
    assert found["lost"] == [], again
  with capsys.disabled():
    print(f" [{campaign.name}: seed {SEED}]", end="")


def test_a_campaign_goes_on_where_it_was_and_counts_what_was_lost(tmp_path):
  tried = []

  def attempt(case, seed, folder):
    tried.append(case)
    return {"tried": 2, "lost": ["x"] if case == "b/1" else []}

  campaign = Campaign("some", "", lambda seed: ("a/0", "b/0", "b/1"), attempt)
  out, ever = epath.Path(tmp_path), time.monotonic() + 1000
  assert carry_out(campaign, 0, out, until=0) == []
  carry_out(Campaign("some", "", lambda seed: ("a/0",), attempt), 0, out, ever)
  with row_file(out / "some.jsonl").path.open("a") as file:
    file.write('{"case": "b/0", "se')  # a kill
  rows = carry_out(campaign, 0, out, ever)
  assert tried == ["a/0", "b/0", "b/1"] and rows == row_file(out / "some.jsonl").read()
  text = table({"some": rows}, {"some": 3})
  assert "| some | b | 2 | 4 | 1 |" in text and "3 of 3 cases" in text
  carry_out(campaign, 1, out, ever)
  assert len(tried) == 6


def test_dtypes_disagree_where_one_is_worse_with_every_seed():
  pairs = lambda *worse: [
    {"float32": {"loss": 0.5, "sft": 0.03, "rl": 0.8},
     "bfloat16": {"loss": 0.6, "sft": 0.03, "rl": 0.8 - fall}} for fall in worse
  ]  # fmt: skip
  noise = dtypes.compared(pairs(0.1, -0.05, 0.02, -0.1, 0.06))
  assert noise["lost"] == [] and noise["rl"]["mean"] == pytest.approx(-0.006)
  # by hand: the standard deviation is 0.0811, t(0.995, 4) = 4.604, so 4.604 * 0.0811 / sqrt(5)
  assert noise["rl"]["width"] == pytest.approx(0.1670, abs=2e-4)
  (lost,) = dtypes.compared(pairs(0.1, 0.11, 0.09, 0.1, 0.12))["lost"]
  assert lost.startswith("rl: bfloat16 - float32 is -0.1040")
