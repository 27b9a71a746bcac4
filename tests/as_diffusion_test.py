"""An autoregressive checkpoint becomes a diffusion model: mask token, rows, shift, round trip."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from igpo_jax.convert.__main__ import main
from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.errors import UserError
from igpo_jax.models import hf_layout
from tests.convert_helpers import load
from tests.tiny_tokenizer import make_directory

SIZES = {
  "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
  "intermediate_size": 24, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def causal_model(directory, kind="llama", spare=0, **options):
  """A Hugging Face directory of an autoregressive model, with a tokenizer that has no mask."""
  directory.mkdir()
  make_directory(directory, special=("<|endoftext|>",), template=None)
  tokens = json.loads((directory / "tokenizer.json").read_text())
  ids = [t["id"] for t in tokens["added_tokens"]] + list(tokens["model"]["vocab"].values())
  rows, rng = max(ids) + 1 + spare, np.random.default_rng(0)
  config = SIZES | {"model_type": kind, "vocab_size": rows, "hidden_act": "silu",
                    "architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModel": "x.Y"},
                    "eos_token_id": next(t["id"] for t in tokens["added_tokens"])}  # fmt: skip
  (directory / "config.json").write_text(json.dumps(config | options))
  shapes = {"model.embed_tokens.weight": (rows, 16), "model.norm.weight": (16,)}
  for n in range(2):
    for ours, key in {**hf_layout.ATTENTION, **hf_layout.MLP}.items():
      out = {"k_proj": 8, "v_proj": 8, "ff_proj": 24, "up_proj": 24}.get(ours.split("/")[0], 16)
      into = 24 if ours.startswith("ff_out") else 16
      shapes[key.format(n)] = (16,) if ours.endswith("scale") else (out, into)
    if kind == "qwen2":
      shapes |= {k.format(n): (16 if "q_proj" in k else 8,) for k in hf_layout.QKV_BIASES.values()}
  tensors = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
  if not (config | options)["tie_word_embeddings"]:
    tensors["lm_head.weight"] = rng.normal(size=(rows, 16)).astype(np.float32)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  return directory, rows


def convert(source, target, *options):
  main([f"--source={source}", f"--target={target}", "--as-diffusion", *options])
  return target


@pytest.mark.parametrize("tied", [True, False])
def test_a_mask_token_is_added_and_gets_a_row(tmp_path, tied):
  source, rows = causal_model(tmp_path / "ar", tie_word_embeddings=tied)
  target = convert(source, tmp_path / "diffusion")
  pre = load_pretrained(target, dtype="float32")
  assert pre.config.family == "a2d_llama" and pre.lm.shift == 1
  assert pre.config.mask_id == pre.tokenizer.mask_id == rows
  assert pre.config.vocab_size == -(-(rows + 1) // 128) * 128
  theirs = safetensors.numpy.load_file(source / "model.safetensors")
  ours = safetensors.numpy.load_file(target / "model.safetensors")
  for key in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
    np.testing.assert_array_equal(ours[key][:rows], theirs[key])
    mean = np.broadcast_to(theirs[key].mean(axis=0), ours[key][rows:].shape)
    np.testing.assert_allclose(ours[key][rows:], mean, atol=1e-6)
  rest = theirs.keys() - {"model.embed_tokens.weight", "lm_head.weight"}
  assert all(np.array_equal(ours[key], theirs[key]) for key in rest)
  config = json.loads((target / "config.json").read_text())
  assert config["model_type"] == "a2d-llama" and "auto_map" not in config
  assert pre.tokenizer.encode("eggs") == load_pretrained(target).tokenizer.encode("eggs")
  # What was made is a model like any other: to Orbax and back, bit for bit.
  main([f"--source={target}", f"--target={tmp_path / 'orbax'}"])
  main([f"--source={tmp_path / 'orbax'}", f"--target={tmp_path / 'back'}"])
  jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "back"), load(target))


def test_rows_that_are_left_are_used_and_a_token_may_be_named(tmp_path):
  source, rows = causal_model(tmp_path / "ar", "qwen2", spare=5)
  pre = load_pretrained(convert(source, tmp_path / "one"), dtype="float32")
  assert (pre.config.vocab_size, pre.config.mask_id) == (rows, rows - 5)
  assert pre.config.family == "a2d_qwen2"
  tokens = json.loads((source / "tokenizer.json").read_text())
  name, number = next(iter(tokens["model"]["vocab"].items()))
  made = convert(source, tmp_path / "two", f"--mask_token={name}", "--shift_logits=false")
  assert json.loads((made / "config.json").read_text())["mask_token_id"] == number
  assert (made / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
  assert load_pretrained(made, dtype="float32").lm.shift == 0


def test_what_cannot_become_one_is_told(tmp_path):
  source, _ = causal_model(tmp_path / "ar", rope_scaling={"rope_type": "llama3", "factor": 32.0},
                           mlp_bias=True, brand_new=1)  # fmt: skip
  with pytest.raises(UserError) as error:
    convert(source, tmp_path / "x")
  for text in ("rope_scaling", "mlp_bias=True", "brand_new=1"):
    assert text in str(error.value)
  with pytest.raises(UserError, match=r"is an autoregressive model: .* --as-diffusion"):
    load_pretrained(source)
  (tmp_path / "gemma").mkdir()
  (tmp_path / "gemma" / "config.json").write_text('{"model_type": "gemma"}')
  with pytest.raises(UserError, match="it is for qwen2, qwen3, llama"):
    convert(tmp_path / "gemma", tmp_path / "x")
  with pytest.raises(UserError, match="go with --as-diffusion"):
    main([f"--source={source}", f"--target={tmp_path / 'x'}", "--mask_token=x"])
  (source / "tokenizer.json").unlink()
  with pytest.raises(UserError, match=r"has no tokenizer\.json"):
    convert(source, tmp_path / "x")
