"""A model trained from scratch, exported for the released PyTorch code."""

from __future__ import annotations

import json
import os
import pathlib

import jax
import numpy as np
import pytest

from igpo_jax.config import Config, ModelConfig
from igpo_jax.data.tokenizer import CharTokenizer
from igpo_jax.errors import UserError
from igpo_jax.models import make_lm
from tests.convert_helpers import convert, save_run

TOKENIZER = CharTokenizer("0123456789+=> ")
MODEL = ModelConfig(
  d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden=48,
  vocab_size=TOKENIZER.vocab_size, mask_id=TOKENIZER.mask_id, eos_id=TOKENIZER.eos_id,
)  # fmt: skip
FILES = ("configuration_llada.py", "modeling_llada.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  params = make_lm(MODEL).init(jax.random.key(0))
  workdir = tmp_path_factory.mktemp("run") / "x"
  return save_run(workdir, Config(model=MODEL), params, TOKENIZER), params


@pytest.mark.slow
def test_code_is_named_only_where_it_is(run, tmp_path):
  step, _ = run
  alone = convert(step, tmp_path / "alone")
  assert "auto_map" not in json.loads((alone / "config.json").read_text())
  code = tmp_path / "code"
  code.mkdir()
  for name in FILES:
    (code / name).write_text(f"# {name}\n")
  together = convert(step, tmp_path / "together", f"--code={code}")
  named = json.loads((together / "config.json").read_text())["auto_map"]
  assert "AutoModelForCausalLM" in named
  for reference in named.values():
    assert (together / f"{reference.partition('.')[0]}.py").read_text().startswith("# ")


def test_code_that_is_not_there_is_told(run, tmp_path):
  (tmp_path / FILES[0]).write_text("")
  with pytest.raises(UserError, match=f"--code=.* has no {FILES[1]}"):
    convert(run[0], tmp_path / "out", f"--code={tmp_path}")
  assert not (tmp_path / "out").exists()


def test_the_released_code_gives_the_same_logits(run, tmp_path):
  """Needs torch, transformers 4 and $IGPO_LLADA_CODE, a folder with LLaDA's two code files."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = os.environ.get("IGPO_LLADA_CODE")
  if not folder:
    pytest.skip("IGPO_LLADA_CODE names no folder with the released code")
  step, params = run
  exported = convert(step, tmp_path / "out", f"--code={pathlib.Path(folder)}")
  model = transformers.AutoModel.from_pretrained(
    exported, trust_remote_code=True, torch_dtype=torch.float32
  ).eval()
  tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 12))
  with torch.no_grad():
    theirs = model(torch.from_numpy(tokens)).logits.numpy()
  ours = np.asarray(make_lm(MODEL).logits(params, tokens.astype(np.int32)))
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
