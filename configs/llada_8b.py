"""IGPO on LLaDA-8B-Instruct with LoRA: the paper's setting but for the learning rate.

    python -m igpo_jax.main --config=configs/llada_8b.py \\
        --config.init_from=DIR --config.data.rl=URI --config.data.eval=gsm8k=URI

docs/method.md#defaults has the paper's, and the comment below says why not its rate.
The sizes are those of the published config.json: 8,015,581,184 parameters. They are
read from `init_from` when there is one; here they let a program be compiled, or its
memory be counted, without the weights.
"""

from igpo_jax.config import default_config


def get_config():
  config = default_config()
  model = config.model
  model.d_model = 4096
  model.n_layers = 32
  model.n_heads = 32
  model.n_kv_heads = 32
  model.mlp_hidden = 12288
  model.vocab_size = 126464
  model.mask_id = 126336
  model.eos_id = 126081
  model.stop_ids = (126081, 126348)  # <|endoftext|>, <|eot_id|>
  model.rope_theta = 500_000.0
  model.rms_norm_eps = 1e-5
  model.tie_embeddings = False
  model.dtype = "bfloat16"
  model.param_dtype = "bfloat16"
  model.remat = "full"
  model.attention = "auto"
  model.lora.rank = 128
  model.lora.alpha = 64.0

  config.stages = ("rl",)
  config.data.prompt_buckets = (96, 128, 192, 256, 384, 512)  # docs/scaling.md#padding
  config.mesh.data = 1
  config.mesh.fsdp = -1

  config.sampler.gen_length = 256
  config.sampler.block_length = 32
  config.sampler.steps = 128
  config.sampler.temperature = 1.2
  config.rl.prompts_per_step = 8
  config.rl.group_size = 8
  config.rl.inner_updates = 4
  # The paper's 5e-7 is for all parameters. Of adapters an update at that rate moves the outputs
  # of a layer a hundredth as far; 3e-6 is d1's for this model and rank (docs/scaling.md).
  config.rl_optimizer.learning_rate = 3e-6
  return config
