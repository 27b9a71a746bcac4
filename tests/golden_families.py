"""Every model family against outputs of its reference code: python -m tests.golden_families DIR

DIR holds a folder for each family: config.json, model.safetensors, and what the reference gives.
golden.npz has input_ids[B,T] and logits[B,T,V], or logits_shifted, moved to the tokens that they
predict; if known also the residual stream [B,T,D], hidden_embed, hidden_after_block0, ... and
hidden_after_norm, and what routers chose. golden_padded.npz is the same with attention_mask[B,T].
generate/*.npz are traces of the decoders in `KINDS`. The weights go through
`igpo_jax.convert` to an Orbax checkpoint and back, which has to give every bit again, and what
is compared is computed from that checkpoint. A line per case: its error, and what it may be.
Exit code 1 if one is out of its tolerance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from igpo_jax.config import SamplerConfig
from igpo_jax.convert.__main__ import main as convert
from igpo_jax.convert.pretrained import Pretrained, load_pretrained
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.models import families, moe, network
from igpo_jax.types import Canvas

TOLERANCE = 1e-4  # of logits up to 16; the references' own float32 error is 2e-5
LEFT_OUT = (np.nan, np.inf)


@dataclasses.dataclass(frozen=True)
class Result:
  """One comparison: `error` against `tolerance`; of tokens, how many differ, against 0."""

  name: str
  error: float
  tolerance: float
  note: str = ""

  @property
  def passed(self) -> bool:
    return bool(self.error <= self.tolerance)  # not so for NaN

  def __str__(self) -> str:
    verdict = "ok" if self.passed else "FAIL"
    note = f"  {self.note}" if self.note else ""
    return f"{verdict:4} {self.name}: {self.error:.2g} (at most {self.tolerance:.2g}){note}"


def compare(name: str, ours, theirs, where=True, note: str = "") -> Result:
  """The largest difference, where it counts; the tolerance grows with the numbers' size."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape, f"{name}: {ours.shape} against {theirs.shape}"
  where = np.broadcast_to(where, theirs.shape)
  error = np.abs(ours - theirs)[where]
  size = np.abs(theirs[where]).max(initial=0)
  worst = np.nan if np.isnan(error).any() else error.max(initial=0)
  return Result(name, worst, TOLERANCE * max(1.0, size / 16), note)


def count_different(name: str, ours, theirs, note: str = "") -> Result:
  return Result(name, int((np.asarray(ours) != np.asarray(theirs)).sum()), 0, note)


# --- weights --------------------------------------------------------------------------------


def mask_of(folder: pathlib.Path) -> int | None:
  """The mask token that the cases of a folder were made with, where config.json names none."""
  for file in sorted(folder.rglob("*.npz")):
    case = np.load(file)
    if "mask_id" in case:
      return int(case["mask_id"])
  return None


def open_folder(folder: pathlib.Path, work: pathlib.Path) -> tuple[Pretrained, Result]:
  """(the model, through a conversion, and whether the way back gives every bit again)."""
  source = work / "hf"
  source.mkdir(parents=True)
  config = json.loads((folder / "config.json").read_text())
  if config.get("mask_token_id") is None and (mask := mask_of(folder)) is not None:
    config["mask_token_id"] = mask
  block = block_of(folder)
  if config.get("block_size") is None and block:
    config["block_size"] = block
  (source / "config.json").write_text(json.dumps(config))
  for file in folder.glob("*.safetensors*"):
    shutil.copy(file, source)
  convert([f"--source={source}", f"--target={work / 'orbax'}"])
  convert([f"--source={work / 'orbax'}", f"--target={work / 'back'}"])
  first, second = (load_bits(work / name) for name in ("hf", "back"))
  different = len(first.keys() ^ second.keys())
  different += sum(not np.array_equal(first[k], second[k]) for k in first.keys() & second.keys())
  back = json.loads((work / "back" / "config.json").read_text())
  different += back != config
  return load_pretrained(work / "orbax", dtype="float32"), Result("round trip", different, 0)


def block_of(folder: pathlib.Path) -> int:
  """The length of a block-causal model's blocks, from the mask that its golden file has."""
  golden = np.load(folder / "golden.npz")
  return int(golden["visible"][0].sum()) if "visible" in golden else 0


def load_bits(directory: pathlib.Path) -> dict[str, np.ndarray]:
  tensors = {}
  for file in directory.glob("*.safetensors"):
    tensors |= safetensors.numpy.load_file(file)
  return {k: v.view(f"u{v.dtype.itemsize}") for k, v in tensors.items()}


# --- logits, hidden states, routers -----------------------------------------------------------


def forward_cases(pre: Pretrained, folder: pathlib.Path) -> Iterator[Result]:
  for file in sorted(folder.glob("golden*.npz")):
    golden = dict(np.load(file))
    if file.stem == "golden_trace":
      yield from trace_cases(pre, golden)
    elif file.stem == "golden_train":
      yield from train_cases(pre, golden)
    else:
      yield from plain_cases(pre, file.stem, golden)


def plain_cases(pre: Pretrained, name: str, golden) -> Iterator[Result]:
  tokens = jnp.asarray(golden["input_ids"])
  mask = golden.get("attention_mask")
  valid = None if mask is None else jnp.asarray(mask == 1)
  where = True if mask is None else (mask == 1)[..., None]
  if "logits_shifted" in golden:
    # The first real position after padding is predicted by a padded one's state.
    if mask is not None:
      before = np.pad(mask, ((0, 0), (1, 0)), mode="edge")[:, :-1] == 1
      where = where & before[..., None]
    theirs = golden["logits_shifted"]
  else:
    theirs = golden["logits"]
  ours = jax.jit(pre.lm.logits)(pre.params, tokens, valid)
  yield compare(f"{name}: logits", ours, theirs, where)
  if "logits_f64" in golden and "logits_shifted" not in golden:
    yield compare(f"{name}: logits in float64", ours, golden["logits_f64"], where)
  if "hidden_embed" in golden:
    yield from layer_cases(pre, name, tokens, valid, golden)


def layer_cases(pre: Pretrained, name: str, tokens, valid, golden) -> Iterator[Result]:
  """The residual stream after each block, what is inside the blocks, and the router's choices."""
  config = pre.config
  design = families.check(config).design(config)
  places = network.find_places(config, design, tokens.shape[1], valid)
  x = pre.params["wte"]["embedding"][tokens]
  yield compare(f"{name}: hidden_embed", x, golden["hidden_embed"])
  number = 0
  for stack, size in network.stack_sizes(config).items():
    block = network.Block(config, design, stack != "blocks")
    # One program a stack: operation by operation there are hundreds of small ones to compile.
    seen_in = jax.jit(lambda weights, x, block=block: block.apply(
      {"params": weights}, x, None, valid, 0, places, capture_intermediates=True,
      mutable=["intermediates", "routing"],
    ))  # fmt: skip
    for i in range(size):
      (x, _), state = seen_in(jax.tree.map(lambda w, i=i: np.asarray(w)[i], pre.params[stack]), x)
      yield compare(f"{name}: after block {number}", x, golden[f"hidden_after_block{number}"])
      yield from block_cases(config, design, number, state["intermediates"], golden, name)
      number += 1
  norm = nn.RMSNorm(epsilon=config.rms_norm_eps)
  h = norm.apply({"params": pre.params["ln_f"]}, x)
  key = "hidden_after_norm" if "hidden_after_norm" in golden else "hidden_after_ln_f"
  yield compare(f"{name}: {key}", h, golden[key])


INSIDE = {
  "attn_norm": "attn_norm", "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj",
  "qkv": "qkv_proj", "q_norm": "q_norm", "k_norm": "k_norm", "attn_out": "attn_out",
  "ff_norm": "ff_norm", "mlp_out": "ff_out", "ff_out": "ff_out", "ff_proj": "ff_proj",
  "up_proj": "up_proj",
}  # fmt: skip


def block_cases(config, design, number: int, seen, golden, name: str) -> Iterator[Result]:
  """What is inside one block."""
  of = lambda module: seen[module]["__call__"][0]
  if number == 0:
    for theirs, module in INSIDE.items():
      if f"b0_{theirs}" in golden and module in seen:
        expected, ours = golden[f"b0_{theirs}"], np.asarray(of(module))
        if ours.ndim == 4 and ours.shape != expected.shape:  # heads first
          ours = ours.swapaxes(1, 2)
        yield compare(f"{name}: block 0 {theirs}", ours, expected)
  if f"router_logits{number}" not in golden:
    return
  logits, bias = of("router")
  choice = moe.route(logits, design.router, config.moe, bias)
  yield compare(f"{name}: router logits {number}", logits, golden[f"router_logits{number}"])
  scores = golden.get(f"router_probs{number}", golden.get(f"router_scores{number}"))
  yield compare(f"{name}: router scores {number}", choice.probabilities, scores)
  # Some references give the experts by weight, others by number.
  by_number = lambda e, w: (np.sort(e, -1), np.take_along_axis(w, np.argsort(e, -1), -1))
  experts, weights = by_number(np.asarray(choice.experts), np.asarray(choice.weights))
  expected = by_number(golden[f"experts{number}"], golden[f"expert_weights{number}"])
  yield count_different(f"{name}: experts {number}", experts, expected[0])
  yield compare(f"{name}: expert weights {number}", weights, expected[1])
  out = of("experts") + (of("shared_ff_out") if "shared_ff_out" in seen else 0)
  for key in (f"moe_out{number}", f"mlp_out{number}"):
    if key in golden:
      yield compare(f"{name}: {key}", out, golden[key])


def train_cases(pre: Pretrained, golden) -> Iterator[Result]:
  """The noisy half of two copies, and the loss that is read from it."""
  noisy, clean = (jnp.asarray(golden[key]) for key in ("noisy_ids", "clean_ids"))
  length = noisy.shape[1]
  h = jax.jit(pre.lm.hidden_of_two)(pre.params, noisy, clean)
  logits = pre.lm.head(pre.params, h)
  yield compare("golden_train: noisy logits", logits, golden["logits"][:, :length])
  config = pre.config
  design = families.check(config).design(config)
  visible = network.two_copies(config, design, length, None).visible[0]
  yield count_different("golden_train: visible", visible, golden["visible"])
  if "token_loss_f64" in golden:
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), clean[..., None], axis=-1)[..., 0]
    loss = (-np.asarray(logp, np.float64) / golden["p_mask"])[golden["target_mask"]]
    yield compare("golden_train: token losses", loss, golden["token_loss_f64"])
    answered = (golden["labels"] != -100).sum()
    yield compare("golden_train: loss", loss.sum() / answered, golden["loss_f64"])


def trace_cases(pre: Pretrained, golden) -> Iterator[Result]:
  """Log-probabilities of a trace, one view a step, under the views' own masks."""
  config = pre.config
  design = families.check(config).design(config)
  model = network.Transformer(config, design)
  for shrink in (1, 2):
    get = lambda key, k=shrink: golden[f"s{k}_{key}"]
    tokens, response = jnp.asarray(get("ext_ids")), golden["commit_step"].shape[1]
    tables = network.rope_tables(
      jnp.asarray(get("position_ids")), config.rotary_size, config.rope_theta
    )
    places = network.Places(*tables, jnp.asarray(get("visible")))
    h = jax.jit(model.apply)({"params": pre.params}, tokens, None, places)
    prompt = int(golden["prompt_len"])
    rows = jnp.concatenate([h[:, :prompt], h[:, -response:]], axis=1)
    targets = jnp.asarray(golden["input_ids"])[get("row")]
    logp = jax.nn.log_softmax(pre.lm.head(pre.params, rows))
    logp = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    yield compare(f"golden_trace: shrink {shrink}", logp, get("logp_f64"), get("p_mask"))


# --- decoding -----------------------------------------------------------------------------------


def decoding_cases(pre: Pretrained, folder: pathlib.Path, brief: bool) -> Iterator[Result]:
  seen = set()
  for file in sorted(folder.glob("generate/*.npz")):
    case = dict(np.load(file))
    for kind, run in KINDS:
      if kind(file.stem, case):
        yield from run(pre, f"generate/{file.stem}", case, brief and run in seen)
        seen.add(run)
        break
    else:
      yield Result(f"generate/{file.stem}", np.nan, 0, "no decoder is known for these fields")


def run_denoise(pre: Pretrained, tokens, fixed, valid, cfg: SamplerConfig, lm=None, noise=None):
  canvas = Canvas(jnp.asarray(tokens, jnp.int32), jnp.asarray(fixed), jnp.asarray(valid))
  out = denoise(lm or pre.lm, pre.params, canvas, jax.random.key(0), cfg, noise=noise)
  return np.asarray(out.tokens), np.asarray(out.commit_step), int(out.forwards)


def official(pre: Pretrained, name: str, case, brief: bool) -> Iterator[Result]:
  """The loop of IGPO's authors."""
  del brief  # one way only
  eot = int(case["eot_id"])
  lm = pre.lm._replace(eos_id=eot, stop_ids=(eot,), mask_id=int(case["mask_id"]))
  options = {k: int(case[k]) for k in ("gen_length", "block_length", "steps")}
  scales = {k: float(case[k]) for k in ("temperature", "cfg_scale")}
  cfg = SamplerConfig(**options, **scales, early_stop="batch")
  x = case["initial_x"]
  tokens, steps, forwards = run_denoise(pre, x, case["fixed_mask"], np.ones(x.shape, bool), cfg, lm)
  yield count_different(f"{name}: tokens", tokens, case["final_x"])
  if forwards == len(case["call_x"]) == cfg.steps:
    yield count_different(f"{name}: commit steps", steps, case["reveal_call"])


def reveals_of(case) -> np.ndarray:
  """i[B,T], the call that filled each position; -1 where none did. Earlier rows may be one."""
  initial, canvas = case["initial_x"], case["canvas"]
  before = np.concatenate([initial[None], canvas[:-1]])
  changed = (before != canvas) & (before == int(case["mask_id"]))
  return np.where(changed.any(0), changed.argmax(0), -1)


def in_order(calls: np.ndarray) -> np.ndarray:
  """The order in which each row's positions were filled: call numbers without gaps."""
  out = np.full(calls.shape, -1)
  for row, numbers in enumerate(calls):
    known = np.unique(numbers[numbers >= 0])
    out[row] = np.where(numbers >= 0, np.searchsorted(known, numbers), -1)
  return out


def mdlm(pre: Pretrained, name: str, case, brief: bool) -> Iterator[Result]:
  """dllm's block loop; of "sample" blocks are counted from the end of each row's prompt."""
  del brief  # one way only
  initial, mask = case["initial_x"], case["attention_mask"] == 1
  block, per_block = int(case["block_size"]), int(case["steps_per_block"])
  rows, total = initial.shape
  prompts = case["prompt_lens"] if "sample" in name else np.zeros(rows, int)
  # Ours has the prompts on the right of their columns, and whole blocks.
  longest = prompts.max()
  length = -(-(total - longest) // block) * block
  tokens = np.full((rows, longest + length), pre.lm.eos_id)
  fixed, valid = np.ones(tokens.shape, bool), np.zeros(tokens.shape, bool)
  places = []
  for row, prompt in enumerate(prompts):
    begin, inside = longest - prompt, min(total, length + prompt)
    places.append(slice(begin, begin + inside))
    tokens[row, places[-1]] = initial[row, :inside]
    fixed[row, places[-1]] = case["fixed_mask"][row, :inside]
    valid[row, places[-1]] = mask[row, :inside]
  cfg = SamplerConfig(
    gen_length=length, block_length=block, steps=per_block * (length // block),
    schedule="rounded", early_stop="none",
  )  # fmt: skip
  found, steps, _ = run_denoise(pre, tokens, fixed, valid, cfg)
  shape = initial.shape
  back, calls = initial.copy(), np.full(shape, -1)
  for row, place in enumerate(places):
    width = place.stop - place.start
    back[row, :width], calls[row, :width] = found[row, place], steps[row, place]
  yield count_different(f"{name}: tokens", back, case["final_x"])
  yield count_different(f"{name}: order", in_order(calls), in_order(reveals_of(case)))


def dream(pre: Pretrained, name: str, case, brief: bool) -> Iterator[Result]:
  """Dream's own loop over the whole answer."""
  del brief  # one way only
  initial = case["initial_x"]
  length, alg = int(case["max_new_tokens"]), str(case["alg"])
  valid = np.ones(initial.shape, bool)
  if "attention_mask" in case:
    valid = case["attention_mask"] == 1
  fixed = np.arange(initial.shape[1]) < initial.shape[1] - length
  cfg = SamplerConfig(
    gen_length=length, block_length=length, steps=int(case["steps"]), remasking=alg,
    schedule="even" if alg == "origin" else "linear", early_stop="none",
  )  # fmt: skip
  noise = None
  if alg == "origin":
    noise = lambda call, shape: case["uniform"][call]
  fixed = np.broadcast_to(fixed, initial.shape)
  found, steps, _ = run_denoise(pre, initial, fixed, valid, cfg, noise=noise)
  yield count_different(f"{name}: tokens", found, case["final_x"])
  yield count_different(f"{name}: order", in_order(steps), in_order(reveals_of(case)))


def block_diffusion(pre: Pretrained, name: str, case, brief: bool) -> Iterator[Result]:
  """SDAR's and LLaDA2.0's loops: blocks from the beginning of the prompt, the last one whole."""
  case = {k: v[None] if k in ("initial_x", "final_x") and v.ndim == 1 else v
          for k, v in case.items()}  # fmt: skip
  if case["canvas"].ndim == 2:
    case["canvas"] = case["canvas"][:, None]
  initial, block = case["initial_x"], int(case["block_size"])
  total, prompt = initial.shape[1], case["prompt_ids"].shape[-1]
  per_block = int(case.get("denoising_steps", case.get("steps_per_block", 1)))
  strategy = str(case.get("strategy", "low_confidence_dynamic"))
  stops = "stop_ids" in case
  lm = pre.lm._replace(mask_id=int(case["mask_id"]))
  if stops:
    lm = lm._replace(stop_ids=tuple(int(i) for i in case["stop_ids"]))
  shared = {
    "steps": 0, "schedule": "full_block",
    "remasking": "sequential" if strategy == "sequential" else "low_confidence",
    "threshold": float(case["threshold"]) if strategy == "low_confidence_dynamic" else None,
    "early_stop": "stop_token" if stops else "none",
  }  # fmt: skip
  # With and without left padding, and the cache; the canvas begins with the prompt, or behind it.
  ways = (
    ("left padding, ", 3, 0, "dual"),
    ("", 0, 0, "none"),
    ("from the prompt's end, ", 2, prompt, "dual"),
  )
  for label, padding, first, cache in ways[:1] if brief else ways:
    left = -(-first // block) * block + padding - first if first else padding
    length = total - first
    if first:  # the canvas has whole blocks: it begins a little earlier
      length += -length % block
    pad = lambda x, value, n=left: np.pad(x, ((0, 0), (n, 0)), constant_values=value)
    fixed = pad(np.broadcast_to(np.arange(total) < prompt, initial.shape), True)
    valid = pad(np.ones(initial.shape, bool), False)
    cfg = SamplerConfig(
      gen_length=length, block_length=block, cache=cache,
      **shared | {"steps": per_block * (length // block)},
    )  # fmt: skip
    found, steps, _ = run_denoise(pre, pad(initial, lm.eos_id), fixed, valid, cfg, lm)
    found, steps = found[:, left:], steps[:, left:]
    expected, told = case["final_x"], f"{label}cache {cache}"
    if stops:  # theirs leaves masks after the end, ours fills them
      expected = np.where(expected == lm.mask_id, lm.eos_id, expected)
    yield count_different(f"{name}: tokens, {told}", found, expected)
    reveals = reveals_of(case)
    ours = np.where(reveals < 0, -1, steps) if stops else steps
    yield count_different(f"{name}: order, {told}", in_order(ours), in_order(reveals))


def token_editing(pre: Pretrained, name: str, case, brief: bool) -> Iterator[Result]:
  """LLaDA2.1's loop: what is filled may be replaced while its block is the active one."""
  initial, block = case["initial_x"][None], int(case["block_size"])
  total, prompt = initial.shape[1], len(case["prompt_ids"])
  ways = ((", left padding", 3, "dual"), ("", 0, "none"))
  for label, padding, cache in ways[:1] if brief else ways:
    pad = lambda x, value, n=padding: np.pad(x, ((0, 0), (n, 0)), constant_values=value)
    fixed = pad((np.arange(total) < prompt)[None], True)
    valid = pad(np.ones(initial.shape, bool), False)
    cfg = SamplerConfig(
      gen_length=total, block_length=block, steps=total, schedule="full_block",
      threshold=float(case["threshold"]), edit_threshold=float(case["editing_threshold"]),
      edit_passes=int(case["max_post_steps"]), cache=cache, early_stop="none",
    )  # fmt: skip
    found, _, forwards = run_denoise(pre, pad(initial, pre.lm.eos_id), fixed, valid, cfg)
    told = f"cache {cache}{label}"
    yield count_different(f"{name}: tokens, {told}", found[:, padding:], case["final_x"][None])
    yield Result(f"{name}: calls, {told}", abs(forwards - len(case["canvas"])), 0)


KINDS = (
  (lambda name, case: "editing_threshold" in case, token_editing),
  (lambda name, case: "num_transfer_tokens" in case, official),
  (lambda name, case: name.startswith("mdlm"), mdlm),
  (lambda name, case: "alg" in case, dream),
  (lambda name, case: "strategy" in case or name.startswith("v20"), block_diffusion),
)


# --- all of it -----------------------------------------------------------------------------------


def results_of(folder: pathlib.Path, brief: bool = False) -> Iterator[Result]:
  """Every case of a family's folder.

  Args:
    brief: all ways to decode (with a cache and without one, padded, from the prompt's end) for the
      first case of each loop only; the others are padded and cached.
  """
  with tempfile.TemporaryDirectory() as work, jax.default_matmul_precision("highest"):
    pre, round_trip = open_folder(folder, pathlib.Path(work))
    yield round_trip
    yield from forward_cases(pre, folder)
    yield from decoding_cases(pre, folder, brief)


def is_family(folder: pathlib.Path) -> bool:
  names = ("config.json", "model.safetensors", "golden.npz")
  return all((folder / name).exists() for name in names)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m tests.golden_families",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("directory", type=pathlib.Path)
  parser.add_argument("--family", action="append", help="only the folder of this name")
  args = parser.parse_args(argv)
  folders = [args.directory] if is_family(args.directory) else sorted(args.directory.iterdir())
  folders = [f for f in folders if is_family(f) and (not args.family or f.name in args.family)]
  if not folders:
    print(f"{args.directory} has no folder with config.json, model.safetensors and golden.npz",
          file=sys.stderr)  # fmt: skip
    return 2
  failed = 0
  for folder in folders:
    count = wrong = 0
    for result in results_of(folder):
      print(f"{folder.name}  {result}", flush=True)
      count, wrong = count + 1, wrong + (not result.passed)
    print(f"{folder.name}  {count - wrong} of {count} cases within tolerance", flush=True)
    failed += wrong
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
