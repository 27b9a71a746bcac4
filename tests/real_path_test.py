"""A whole run at a small size, from Hugging Face files to Hugging Face files.

Nothing is replaced by a stand-in but the sizes, the weights and the verifier that rewards
(tests/real_path_config.py): SFT, RL with hints, evaluation, a kill, the rest of the run,
adapters for PEFT and a merged model for Hugging Face, both loaded back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from benchmarks.reliability.table import untimed
from igpo_jax import main
from igpo_jax.config import freeze, load_config_file
from igpo_jax.convert.__main__ import main as convert
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.eval.protocols import IGPO_TEMPLATE
from igpo_jax.models import lora
from tests.paths import REPO
from tests.tiny_tokenizer import SPECIAL, make_directory

pytestmark = pytest.mark.slow
CONFIG = REPO / "tests" / "real_path_config.py"
D, HIDDEN, LAYERS = 32, 64, 2
KILLED_AFTER = 2  # RL steps


def write_checkpoint(path):
  """A model of LLaDA's shape in miniature: config.json, tokenizer files, model.safetensors."""
  make_directory(path)
  vocabulary = json.loads((path / "tokenizer.json").read_text())
  ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
  size = 1 + max(*ids.values(), *vocabulary["model"]["vocab"].values())
  assert set(SPECIAL) <= set(ids)
  config = json.loads((REPO / "tests" / "goldens" / "llada_tiny" / "config.json").read_text())
  config |= {
    "d_model": D, "n_layers": LAYERS, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": HIDDEN,
    "vocab_size": size, "embedding_size": size, "mask_token_id": ids["<|mdm_mask|>"],
    "eos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
  }  # fmt: skip
  (path / "config.json").write_text(json.dumps(config))

  rng, tensors = np.random.default_rng(0), {}
  matrix = lambda rows, columns: rng.normal(size=(rows, columns), scale=columns**-0.5)
  shapes = {"q_proj": (D, D), "k_proj": (D, D), "v_proj": (D, D), "attn_out": (D, D),
            "ff_proj": (HIDDEN, D), "up_proj": (HIDDEN, D), "ff_out": (D, HIDDEN)}  # fmt: skip
  for block in range(LAYERS):
    name = f"model.transformer.blocks.{block}"
    tensors |= {f"{name}.{layer}.weight": matrix(*shape) for layer, shape in shapes.items()}
    tensors |= {f"{name}.{norm}.weight": np.ones(D) for norm in ("attn_norm", "ff_norm")}
  tensors["model.transformer.wte.weight"] = matrix(size, D)
  tensors["model.transformer.ln_f.weight"] = np.ones(D)
  tensors["model.transformer.ff_out.weight"] = 3 * matrix(size, D)
  tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
  safetensors.numpy.save_file(tensors, path / "model.safetensors")


def write_data(folder):
  """MetaMathQA's rows, of which some are not used, and three problems of GSM8K's form."""
  rows = []
  for k in range(10):
    question = f"Ann has {k + 2} pens" + " and then buys 3 more" * (k % 3) + ". How many?"
    total = k + 2 + 3 * (k % 3)
    response = f"She has {total}.\n#### {total}\nThe answer is: {total}"
    rows.append({"type": "GSM_AnsAug", "query": question, "response": response})
  rows.append({"type": "GSM_Rephrased", "query": "Other?", "response": "The answer is: 1"})
  rows.append(rows[0])
  (folder / "MetaMathQA.json").write_text(json.dumps(rows))
  problems = [{"question": f"What is {k} + {k}?" + " Think well." * k,
               "answer": f"{k} + {k} = <<{k}+{k}={2 * k}>>{2 * k}\n#### {2 * k}"}
              for k in range(3)]  # fmt: skip
  (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))


def rows_of(workdir, name):
  return untimed(workdir / f"{name}.jsonl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """(folder with the model and data; a run in peace; one that was killed and continued; rows of
  the latter when it died)."""
  folder = tmp_path_factory.mktemp("real")
  write_checkpoint(folder / "LLaDA-tiny")
  write_data(folder)
  peace, war = folder / "peace", folder / "war"
  killed = subprocess.run(
    [sys.executable, "-m", "igpo_jax.main", f"--config={CONFIG}:{folder}", f"--workdir={war}"],
    text=True, capture_output=True, cwd=REPO, check=False,
    env=os.environ | {
      "JAX_PLATFORMS": "cpu",
      "IGPO_TEST_TRIPWIRE": f"{war / 'metrics.jsonl'} rl {KILLED_AFTER} {int(signal.SIGKILL)}",
    },
  )  # fmt: skip
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  died_at = rows_of(war, "metrics")[-1]
  config = freeze(load_config_file(CONFIG, str(folder)))
  for workdir in (war, peace):
    main.train(config, epath.Path(workdir))
  return folder, peace, war, died_at


@pytest.fixture(scope="module")
def trained(runs):
  """The run's last checkpoint: base and adapters."""
  return load_pretrained(runs[1] / "checkpoints" / "rl" / "3", dtype="bfloat16")


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 300, (2, 24)), jnp.int32)


def logits(model):
  return np.asarray(jax.jit(model.lm.logits)(model.params, TOKENS))


def test_a_killed_run_continued_has_the_rows_of_one_in_peace(runs):
  _, peace, war, died_at = runs
  assert (died_at["stage"], died_at["step"]) == ("rl", KILLED_AFTER)
  for name in ("metrics", "samples"):
    assert rows_of(war, name) == rows_of(peace, name), name
  summaries = [json.loads((run / "summary.json").read_text()) for run in (peace, war)]
  assert summaries[0] == summaries[1]


def test_every_stage_did_what_it_is_for(runs):
  _, peace, _, _ = runs
  rows = rows_of(peace, "metrics")
  steps = [("init", 0), ("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2), ("rl", 3)]
  assert [(row["stage"], row["step"]) for row in rows] == steps
  for row in rows:
    if row["stage"] != "init":
      assert row[f"{row['stage']}/grad_norm"] > 0 and row[f"{row['stage']}/skipped"] == 0
  rl = rows[3:]
  assert sum(row["rl/all_wrong_before"] for row in rl) > sum(
    row["rl/all_wrong_after"] for row in rl
  )
  assert any(row["rl/replaced"] > 0 for row in rl) and any(row["rl/kl"] > 0 for row in rl)
  for row in (rows[0], rows[2], rows[5]):
    assert row["eval/gsm8k/n"] == 3 and row["eval/gsm8k/protocol"] == "igpo"


def test_hints_are_pieces_of_the_trace_in_the_models_own_tokens(runs, trained):
  folder, peace, _, _ = runs
  data = json.loads((folder / "MetaMathQA.json").read_text())
  traces = {IGPO_TEMPLATE.replace("{question}", row["query"]): row["response"] for row in data}
  hinted = [row for row in rows_of(peace, "samples") if row["hints"]]
  assert hinted
  for row in hinted:
    ids = trained.tokenizer.encode(traces[row["prompt"]])
    answer = traces[row["prompt"]].index("The answer is:")
    for start, end in row["hints"]:
      piece = trained.tokenizer.decode(ids[start:end])
      assert end <= len(ids) and piece and piece in traces[row["prompt"]][:answer]


def test_prompts_are_asked_in_the_models_chat_format(runs, trained):
  prompt = IGPO_TEMPLATE.replace("{question}", "What is 1 + 1?")
  ids = trained.tokenizer.encode_prompt([{"role": "user", "content": prompt}])
  special = json.loads((runs[0] / "LLaDA-tiny" / "tokenizer.json").read_text())
  names = {token["id"]: token["content"] for token in special["added_tokens"]}
  assert [names[i] for i in ids if i in names] == [
    "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>",
  ]  # fmt: skip


def test_adapters_went_into_training_and_the_base_stayed(runs, trained):
  folder, _, _, _ = runs
  base = load_pretrained(folder / "LLaDA-tiny", dtype="bfloat16")
  adapters, frozen = lora.split(trained.params)
  jax.tree.map(np.testing.assert_array_equal, frozen, base.params)
  moved = [float(jnp.abs(layer["lora_b"]).max()) for layer in adapters["blocks"].values()]
  assert len(moved) == 7 and min(moved) > 0
  assert np.abs(logits(trained) - logits(base)).max() > 1e-2


def test_adapters_for_peft_load_back_to_the_same_logits(runs, trained, tmp_path):
  folder, peace, _, _ = runs
  convert([f"--source={peace / 'checkpoints/rl/3'}", f"--target={tmp_path / 'peft'}", "--to=peft"])
  described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
  assert (described["r"], described["lora_alpha"]) == (4, 8)
  back = load_pretrained(folder / "LLaDA-tiny", dtype="bfloat16", adapter=tmp_path / "peft")
  np.testing.assert_array_equal(logits(back), logits(trained))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merged_model_for_hugging_face_loads_back_to_the_same_logits(
  runs, trained, tmp_path, dtype
):
  """The weights are those of `lora.merge`; in float32 the logits are the adapted model's."""
  _, peace, _, _ = runs
  step = peace / "checkpoints/rl/3"
  convert([f"--source={step}", f"--target={tmp_path / 'hf'}", "--to=hf", "--merge_lora",
           f"--dtype={dtype}"])  # fmt: skip
  back, adapted = load_pretrained(tmp_path / "hf", dtype=dtype), load_pretrained(step, dtype=dtype)
  assert "lora_a" not in back.params["blocks"]["q_proj"]
  assert back.tokenizer.encode_prompt([{"role": "user", "content": "Hi"}]) == (
    trained.tokenizer.encode_prompt([{"role": "user", "content": "Hi"}])
  )
  # The converter sums A B in numpy, `merge` in jax: a last bit may differ, in bfloat16 seldom.
  merged = lora.merge(adapted.params, adapted.config.lora)
  pairs = list(zip(jax.tree.leaves(back.params), jax.tree.leaves(merged), strict=True))
  unit = float(jnp.finfo(dtype).eps)
  for found, expected in pairs:
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=unit, atol=1e-7)
  if dtype == "bfloat16":
    assert np.mean([np.mean(np.asarray(a == b)) for a, b in pairs]) > 0.999
  exact = logits(load_pretrained(step, dtype="float32"))
  apart = lambda model: np.linalg.norm(logits(model) - exact) / np.linalg.norm(exact)
  # Merging in bfloat16 rounds the weights once more: no worse than bfloat16 is on its own.
  assert apart(back) < {"float32": 1e-5, "bfloat16": 2 * apart(adapted)}[dtype]
