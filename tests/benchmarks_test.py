"""Every benchmark runs at a tiny size, and counts what it says it counts."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import denoise, padding, rollout, update
from benchmarks.common import TINY_MODEL
from igpo_jax.cli import UserError
from igpo_jax.config import SamplerConfig
from igpo_jax.models.flops import forward_flops


def run(module, monkeypatch, capsys, *options):
  monkeypatch.setattr(sys, "argv", [module.__name__, *options])
  module.main()
  return json.loads(capsys.readouterr().out)


def test_denoise_at_a_tiny_size(monkeypatch, capsys):
  sizes = "--model=tiny --rows=4 --prompt=6 --gen-length=8 --block-length=4 --steps=8".split()
  cases = "--cases=none,dual+refresh=2+threshold=0.9,none+batches=2"
  out = run(denoise, monkeypatch, capsys, *sizes, cases, "--ragged", "--repeats=2")
  none, dual, halves = out["cases"].values()
  assert none["forwards"] == none["refreshes"] == 8 and dual["refreshes"] < dual["forwards"]
  assert halves["equal_to_first"] == 1.0
  for case in (none, dual, halves):
    assert 0 < case["seconds"]["min"] <= case["seconds"]["median"] <= case["seconds"]["max"]
    assert case["utilisation"] == pytest.approx(
      case["flops"] / case["seconds"]["median"] / out["peak_flops_per_second"]
    )
    assert case["temp_bytes"] > 0 and case["compile_seconds"] > 0
  # Four rows in the first block, of which two are finished after it.
  call = lambda rows: forward_flops(TINY_MODEL, rows, 14, 14, read=4)
  head = 2 * 16 * 64 * (4 + 3 + 2 + 1)  # of one row's block: a step commits one position
  assert none["flops"] == halves["flops"] == 4 * call(4) + 4 * call(2) + head * (4 + 2)
  assert out["compilations_while_timing"] == 0 and out["memory"]["peak_rss_bytes"] > 0


def test_flops_of_cached_calls_by_hand():
  sampler = SamplerConfig(8, 4, 8)
  whole = forward_flops(TINY_MODEL, 2, 10, 10, 0, 4)
  prefix = denoise.parse_case("prefix", sampler)
  assert denoise.seen_widths(prefix) == [8, 4]
  flops = denoise.needed_flops(TINY_MODEL, prefix, [2, 2], 10, [(1, 3), (1, 2)], 36)
  eight, four = (forward_flops(TINY_MODEL, 2, n, 10, 0, 4) for n in (8, 4))
  assert flops == 2 * whole + 3 * eight + 2 * four + 36 * 2 * 16 * 64
  dual = denoise.parse_case("dual+factor=0.5", sampler)
  assert dual.factor == 0.5 and denoise.seen_widths(dual) == [4, 4]


@pytest.mark.parametrize("case", ["dual+speed=9", "dual+threshold=high", "triple"])
def test_a_case_that_cannot_be_is_told(case):
  with pytest.raises(UserError):
    denoise.parse_case(case, SamplerConfig(8, 4, 8))


def test_update_at_a_tiny_size(monkeypatch, capsys):
  """The gradient is that of the plain way, written out with all rows and all logits."""
  sizes = "--model=tiny --group=4 --prompt=6 --gen-length=16 --repeats=1".split()
  out = run(update, monkeypatch, capsys, *sizes, "--cases=plain,ours")
  plain, ours = out["cases"].values()
  assert ours["gradient_distance_to_first"] < 1e-5
  assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5) and ours["loss"] != 0
  assert ours["temp_bytes"] < 0.5 * plain["temp_bytes"]
  whole = forward_flops(TINY_MODEL, 4, 22, 22, head_positions=22)
  one = forward_flops(TINY_MODEL, 1, 22, 22, head_positions=16)
  assert (plain["flops"], ours["flops"]) == (3 * whole, 3 * one)
  assert out["compilations_while_timing"] == 0


def test_rollout_at_a_tiny_size(monkeypatch, capsys):
  sizes = "--model=tiny --prompts=2 --group=2 --prompt=32 --gen-length=8 --block-length=4"
  sizes = [*sizes.split(), "--steps=2"]
  out = run(rollout, monkeypatch, capsys, *sizes, "--wrong=0,1,2", "--repeats=2")
  assert list(out["cases"]) == ["grpo", "igpo 0", "igpo 1", "igpo 2"]
  assert [case["sampled_again"] for case in out["cases"].values()] == [0, 0, 1, 2]
  assert out["compilations_while_timing"] == 0


def test_padding_is_that_of_the_streams_own_batches(monkeypatch, capsys, tmp_path):
  """A long prompt in nine: with 1 slice all rows have its length, with 3 a third of them."""
  path = tmp_path / "rows.jsonl"
  rows = [{"question": "1" * (40 if k == 4 else 3), "trace": "2", "answer": "2"} for k in range(9)]
  path.write_text("\n".join(map(json.dumps, rows)))
  sizes = "--tokenizer=char --prompts=9 --buckets=8,48 --slices=1,3 --completion=10 --batches=2"
  out = run(padding, monkeypatch, capsys, f"--source=jsonl:{path}", *sizes.split())
  (found,) = out["sources"].values()
  assert found["positions"] == {"1": 58.0, "3": round((58 + 18 + 18) / 3, 1)}
  assert found["saved"]["3"] == pytest.approx(1 - found["positions"]["3"] / 58, abs=1e-3)
  # every prompt ends with a token of the chat format
  assert found["without_padding"] == pytest.approx(1 - ((8 * 4 + 41) / 9 + 10) / 58, abs=1e-3)
