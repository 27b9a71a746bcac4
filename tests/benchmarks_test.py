"""Every benchmark runs at a tiny size, and counts what it says it counts."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks import (
  accelerator,
  denoise,
  families,
  padding,
  rollout,
  rounding,
  smollm2,
  update,
)
from benchmarks.common import TINY_MODEL
from igpo_jax.config import SamplerConfig
from igpo_jax.errors import UserError
from igpo_jax.models import attention
from igpo_jax.models.flops import forward_flops


def run(module, monkeypatch, capsys, *options):
  monkeypatch.setattr(sys, "argv", [module.__name__, *options])
  module.main()
  return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_denoise_at_a_tiny_size(monkeypatch, capsys):
  sizes = "--model=tiny --rows=4 --prompt=6 --gen-length=8 --block-length=4 --steps=8".split()
  cases = "--cases=none,dual+refresh=2+threshold=0.9,none+slots=2"
  out = run(denoise, monkeypatch, capsys, *sizes, cases, "--ragged", "--repeats=2")
  none, dual, halves = out["cases"].values()
  assert none["forwards"] == none["refreshes"] == 8 and dual["refreshes"] < dual["forwards"]
  # Two rows of one block, then two of two.
  assert halves["forwards"] == 12 and halves["calls_needed"] == none["calls_needed"] == 24
  assert halves["equal_to_first"] == 1.0
  for case in (none, dual, halves):
    assert 0 < case["seconds"]["min"] <= case["seconds"]["median"] <= case["seconds"]["max"]
    assert case["utilisation"] == pytest.approx(
      case["flops"] / case["seconds"]["median"] / out["peak_flops_per_second"]
    )
    assert case["temp_bytes"] > 0 and case["compile_seconds"] > 0
  # Four rows in the first block, of which two are finished after it: what they need.
  call = lambda rows: forward_flops(TINY_MODEL, rows, 14, 14, read=4)
  head = 2 * 16 * 64 * (4 + 3 + 2 + 1)  # of one row's block: a step commits one position
  assert none["flops"] == halves["flops"] == 4 * call(4) + 4 * call(2) + head * (4 + 2)
  assert out["compilations_while_timing"] == 0 and out["memory"]["peak_rss_bytes"] > 0


PEER = """
def generate(model, prompt, steps, gen_length, block_length, temperature, mask_id):
  import torch
  return torch.cat([prompt, torch.zeros(len(prompt), gen_length, dtype=prompt.dtype)], 1)
"""
PEERS_MODEL = """
import torch
class LLaDAModelLM(torch.nn.Linear):
  def __init__(self, config):
    super().__init__(2, 2)
"""


@pytest.mark.slow
def test_a_peers_sampler_is_timed_in_turns_with_ours(monkeypatch, capsys, tmp_path):
  pytest.importorskip("torch")
  sizes = "--model=tiny --rows=4 --prompt=6 --gen-length=8 --block-length=4 --steps=8".split()
  options = [*sizes, "--cases=none,dual", "--repeats=2", f"--peers={tmp_path}"]
  with pytest.raises(UserError, match=r"no generate\.py"):
    run(denoise, monkeypatch, capsys, *options)
  (tmp_path / "generate.py").write_text(PEER)
  (tmp_path / "modeling_llada.py").write_text(PEERS_MODEL)
  (tmp_path / "configuration_llada.py").write_text("LLaDAConfig = dict\n")
  peers = run(denoise, monkeypatch, capsys, *options)["peers"]
  assert peers["dual"]["problem"] and not peers["dual"]["times_peer"]
  none = peers["none"]
  assert "problem" not in none and len(none["times_peer"]) == 2
  for ours, peer, ratio in zip(none["ours"], none["peer"], none["times_peer"], strict=True):
    assert ratio == pytest.approx(peer / ours)


@pytest.mark.slow
def test_rounding_at_a_small_size(monkeypatch, capsys):
  sizes = "--width=512 --outputs=256 --rows=64 --seeds=2 --updates=4,800".split()
  out = run(rounding, monkeypatch, capsys, *sizes)["mean_least_largest"]
  for kind in ("own", "other"):
    mean = lambda how, updates, kind=kind: out[kind][how][updates]["share"][0]
    assert mean("nearest", "4") < 0.1 < 0.9 < mean("nearest", "800")
    assert abs(mean("stochastic", "800") - 1) < 0.01
  assert abs(out["own"]["stochastic"]["4"]["share"][0] - 1) < 0.1
  # Once they are off bfloat16's numbers, the nearest is right in the mean, too.
  out = run(rounding, monkeypatch, capsys, *sizes, "--weights=float32")["mean_least_largest"]
  assert abs(out["own"]["nearest"]["4"]["share"][0] - 1) < 0.1


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


@pytest.mark.slow
def test_update_at_a_tiny_size(monkeypatch, capsys):
  """The gradient is that of the plain way, written out with all rows and all logits."""
  sizes = "--model=tiny --group=4 --prompt=6 --gen-length=16 --repeats=1".split()
  options = "--cases=plain,ours", "--estimators=coupled,random_ratio", "--most_forwards=1"
  out = run(update, monkeypatch, capsys, *sizes, *options)
  plain, ours, ratio = out["cases"].values()
  assert ours["gradient_distance_to_first"] < 1e-5
  assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5) and ours["loss"] != 0
  assert ours["temp_bytes"] < 0.5 * plain["temp_bytes"]
  whole = forward_flops(TINY_MODEL, 4, 22, 22, head_positions=22)
  one = forward_flops(TINY_MODEL, 1, 22, 22, head_positions=16)
  assert (plain["flops"], ours["flops"]) == (3 * whole, 3 * one)
  assert ratio["flops"] == 3 * forward_flops(TINY_MODEL, 4, 22, 22, head_positions=16)
  assert list(out["to_mean_field"]) == ["random_ratio"] and out["too_many_forwards"] == ["coupled"]
  assert out["to_mean_field"]["random_ratio"]["forwards"] == 4
  assert out["compilations_while_timing"] == 0


@pytest.mark.slow
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


# --- one accelerator, one table ---------------------------------------------------------

TINY_TABLE = (
  "--model=tiny --rows=4 --group=2 --prompt=6 --gen_length=8 --block_length=4 --steps=8 "
  "--lora_rank=2"
).split()


def table_of(monkeypatch, capsys, *options):
  """(exit code, the JSON object, what was printed before it)."""
  monkeypatch.setattr(sys, "argv", ["accelerator", *TINY_TABLE, *options])
  code = accelerator.main()
  *printed, last = capsys.readouterr().out.splitlines()
  return code, json.loads(last), "\n".join(printed)


@pytest.mark.slow
def test_the_accelerators_table_measures_what_it_has_time_for(monkeypatch, capsys, tmp_path):
  """All blocks of the first rollout, one of the second, both programs that learn, no evaluation."""
  times = iter([1e9, 0.0, 0.0, None])
  monkeypatch.setattr(accelerator.Budget, "next_part", lambda self: next(times))
  code, out, text = table_of(monkeypatch, capsys, f"--output={tmp_path / 'out.json'}")
  assert json.loads((tmp_path / "out.json").read_text()) == out
  exact, dual, likelihood, update_line, evaluation = out["lines"]
  assert code == 1  # something was left out
  assert exact["measured"] == "all blocks" and dual["measured"] == "1 of 2 blocks"
  assert "no time left" in evaluation["problem"] and "no time left" in text
  for line in (exact, dual, likelihood, update_line):
    assert line["seconds"] > 0 and line["tokens"] == 4 * 8 and not line["problem"]
    assert line["flops_per_second"] > 0 and line["bytes"] > 0
    assert f"| {line['name']} |" in text
  assert out["peak_flops_per_second"] > 0
  # the exact rollout by hand: four calls a block of two, the head for each masked position
  model = accelerator.dataclasses.replace(TINY_MODEL, lora=accelerator.LoRAConfig(rank=2))
  head = 2 * 16 * 64 * (4 + 3 + 2 + 1) * 4 * 2
  flops = 8 * forward_flops(model, 4, 14, 14, 0, 4) + head
  assert exact["flops_per_second"] * exact["seconds"] == pytest.approx(flops)
  # and of the dual rollout's block: one whole call, three that see the block
  whole, part = (forward_flops(model, 4, n, 14, 0, 4) for n in (14, 4))
  assert dual["flops_per_second"] * dual["seconds"] == pytest.approx(2 * (whole + 3 * part) + head)
  for errors in out["attention"].values():
    assert set(errors) == {"einsum", "dot_product"} and "ok" in text and "WRONG" not in text


@pytest.mark.slow
def test_an_attention_that_loses_its_mask_is_found(monkeypatch):
  right = attention.dot_product
  model = accelerator.dataclasses.replace(TINY_MODEL, dtype="bfloat16")
  good = accelerator.attention_errors(model, 24, 8)
  tolerance = accelerator.TOLERANCE["bfloat16"]
  assert all(1e-4 < value < tolerance for errors in good.values() for value in errors.values())
  monkeypatch.setattr(attention, "dot_product", lambda *qkv: right(*qkv[:3], None))
  bad = accelerator.attention_errors(model, 24, 8)
  assert bad["einsum"] == good["einsum"] and bad["dot_product"]["result"] > tolerance


def test_a_part_that_fails_leaves_the_others_alone():
  class Broken:
    budget = accelerator.Budget(1e6, 4)
    sampler = SamplerConfig(8, 4, 8)

    def denoising(self, name, sampler, seconds):
      if sampler.cache == "dual":
        raise MemoryError("no room\nfor it")
      return accelerator.Line(name, 1.0, 32)

    def learning(self, seconds):
      return [accelerator.Line("likelihood", 1.0, 32)]

  lines = []
  accelerator.run_parts(Broken(), lines.append)
  assert [line.problem for line in lines] == ["", "failed: MemoryError: no room for it", "", ""]


def test_time_is_kept_for_the_parts_to_come():
  budget = accelerator.Budget(accelerator.COMPILE_SECONDS * 4 + 40, 4)
  assert budget.next_part() == pytest.approx(10, abs=1)
  assert accelerator.Budget(accelerator.COMPILE_SECONDS * 4 - 1, 4).next_part() is None


def test_torch_code_is_looked_for_before_anything_and_may_fail(monkeypatch, capsys, tmp_path):
  with pytest.raises(UserError, match=r"no generate\.py there"):
    table_of(monkeypatch, capsys, f"--torch={tmp_path}")
  (tmp_path / "generate.py").write_text("raise RuntimeError('theirs')")
  with pytest.raises(UserError, match=r"no modeling_llada\.py there"):
    table_of(monkeypatch, capsys, f"--torch={tmp_path}")
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "modeling_llada.py").write_text("")
  args = accelerator.argparse.Namespace(
    torch=str(tmp_path), seconds=480, model="tiny", dtype=None, attention=None, rows=4, prompt=6,
    gen_length=8, block_length=4, steps=8,
  )  # fmt: skip
  (line,) = accelerator.torch_lines(args)
  assert line.problem.startswith("failed: exit code 1")


def test_rows_of_a_gguf_file_are_put_in_the_order_of_hugging_face():
  """Two heads of four rows: what is rotated together lies side by side, then half a head apart."""
  rows = np.arange(8)[:, None] * np.ones((1, 3))
  found = smollm2.rows_as_rotated(rows, heads=2)[:, 0]
  assert found.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_families_benchmark_has_a_config_for_every_family():
  args, short = (
    families.make_parser().parse_args(["--workdir=w", option]) for option in ("--grpo", "--short")
  )
  for name in families.FAMILIES:
    for model in (families.config_of(name, options).model for options in (args, short)):
      assert model.family == name and families.FAMILIES[name].design(model) is not None
      assert model.n_layers > model.moe.dense_layers
  config = families.config_of("sdar", args)
  assert config.model.attention_block == families.BLOCK and config.arms
