"""Length alignment from end to end on the generated task, in seconds: CI runs it.

    python -m igpo_jax.rewrite --mode=trim --rules=chains --verifier=exact --tokenizer=char \\
        --source="synthetic:chains?min_steps=2&max_steps=4&detours=1&n=400" \\
        --output=DIR/aligned.jsonl --max_tokens=24 --window=24
    python -m igpo_jax.main --config=configs/sft_tiny.py:DIR/aligned.jsonl --workdir=DIR/sft
    python -m igpo_jax.main --config=configs/sft_tiny.py:DIR/aligned.jsonl --workdir=DIR/rl \\
        --config.stages="('rl',)" --config.init_from=DIR/sft/checkpoints/sft/STEP

Every option of fine-tuning at scale is on; the model is far too small to learn much from it.
"""

from igpo_jax.config import default_config

TASK = "synthetic:chains?min_steps=2&max_steps=4"


def get_config(aligned="runs/sft_tiny/aligned.jsonl"):
  config = default_config()
  config.stages = ("sft",)
  config.data.sft = f"jsonl:{aligned}"
  config.data.rl = f"{TASK}&n=200&seed=2"
  config.data.eval = (f"test={TASK}&split=test&n=32&seed=3",)
  config.data.prompt_buckets = (20,)
  config.reward.verifier = "exact"

  config.model.d_model = 32
  config.model.n_layers = 2
  config.model.mlp_hidden = 64
  config.model.rope_theta = 100.0
  config.sampler.gen_length = 24
  config.sampler.block_length = 8
  config.sampler.steps = 12
  config.sampler.temperature = 1.0

  config.sft.epochs = 1.0
  config.sft.batch_size = 16
  config.sft.response_lengths = (16, 24)
  config.sft.group_batches = 4
  config.sft.eval_every = 10
  config.sft.select = "best"
  config.checkpoint.best_metric = "eval/test/accuracy"
  config.sft_optimizer.learning_rate = 3e-3
  config.sft_optimizer.warmup_steps = 5
  config.sft_optimizer.schedule = "cosine"

  config.rl.steps = 2
  config.rl.prompts_per_step = 4
  config.rl.group_size = 4
  config.rl.inner_updates = 1
  config.rl_optimizer.learning_rate = 1e-4
  config.hints.hide_answer_value = True
  config.hints.chunk_min = 3
  config.hints.chunk_max = 5

  config.eval.initial = False
  config.eval.batch_size = 32
  config.log.samples_every = 1
  config.log.tensorboard = False
  return config
