"""Training with adapters: only they change, and the base is the reference."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath

from igpo_jax.checkpoint import Checkpoints
from igpo_jax.config import freeze
from igpo_jax.data.tokenizer import load_tokenizer
from igpo_jax.main import train
from igpo_jax.models import lora
from igpo_jax.parallel.mesh import make_mesh
from igpo_jax.train.setup import make_model, make_optimizer, make_state, make_tokenizer
from tests.paths import REPO
from tests.tiny_config import get_config
from tests.tiny_tokenizer import make_directory

SPECIAL_IDS = {"mask_token_id": 511, "eos_token_id": 510, "pad_token_id": 510}  # llada_tiny's


def lora_config():
  config = get_config()
  config.model.lora.rank = 2
  config.eval.initial = False
  return freeze(config)


@pytest.mark.slow
def test_a_lora_run_trains_and_saves_adapters_only(tmp_path):
  config, workdir = lora_config(), epath.Path(tmp_path / "run")
  summary = train(config, workdir)
  assert summary["steps"]["rl"] == config.rl.steps

  mesh = make_mesh()
  with jax.set_mesh(mesh):
    model = make_model(config, make_tokenizer(config, workdir), mesh)
    trainable, frozen = lora.split(model.params)
    assert set(trainable["blocks"]["q_proj"]) == {"lora_a", "lora_b"}
    assert set(frozen["blocks"]["q_proj"]) == {"kernel"}
    like = make_state(
      make_optimizer(config.rl_optimizer, 1), trainable, lora.split(model.shardings)[0], mesh
    )
    saved = Checkpoints(workdir / "checkpoints" / "rl").restore(config.rl.steps, like)
  assert jax.tree.structure(saved.params) == jax.tree.structure(trainable)
  # B begins at zero, so an adapter that was trained has a B that is not.
  assert np.abs(np.asarray(saved.params["blocks"]["q_proj"]["lora_b"])).max() > 0


@pytest.mark.slow
def test_fresh_adapters_on_loaded_weights_change_nothing(tmp_path):
  weights = str(REPO / "tests" / "goldens" / "llada_tiny")
  config = dataclasses.replace(lora_config(), init_from=weights)
  plain = dataclasses.replace(
    config, model=dataclasses.replace(config.model, lora=type(config.model.lora)())
  )
  mesh = make_mesh()
  with jax.set_mesh(mesh):
    tokenizer = load_tokenizer(make_directory(tmp_path / "tokenizer", config=SPECIAL_IDS))
    adapted, base = make_model(config, tokenizer, mesh), make_model(plain, tokenizer, mesh)
    assert "lora_a" in adapted.params["blocks"]["q_proj"]
    tokens = np.arange(10)[None]
    np.testing.assert_array_equal(
      adapted.lm.logits(adapted.params, tokens), base.lm.logits(base.params, tokens)
    )
