"""docs/mistakes.md: runs wrong usages of every command and compares their messages with the page.

IGPO_WRITE_DOCS=1 python -m pytest tests/mistakes_test.py     writes the page anew
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest

from igpo_jax import aot, chat, cli, generate, grade, replay, report, show
from igpo_jax import main as train
from igpo_jax.convert import __main__ as convert
from igpo_jax.rewrite import __main__ as rewrite
from igpo_jax.serve import __main__ as serve
from tests.convert_helpers import copy_tiny
from tests.paths import REPO
from tests.registered import only_built_in
from tests.tiny_tokenizer import make_directory

PAGE = REPO / "docs" / "mistakes.md"
COMMANDS = {"main": train, "generate": generate, "chat": chat, "grade": grade, "report": report,
            "show": show, "replay": replay, "rewrite": rewrite, "convert": convert,
            "aot": aot, "serve": serve}  # fmt: skip
HEAD = """# Mistakes, and what is said about them

A mistake of the user gives one line on standard error and exit code 2. The line says what is
wrong, where, and what to do. A traceback is a bug of ours. Ctrl-C ends a command with exit code
130, SIGTERM with 143. tests/mistakes_test.py runs the commands below and writes this page.
`broken.py`, `prompts.jsonl` and the other files are small files that the test makes. Q stands for
`--config=configs/quickstart.py`, M for `--model=model --prompt=x`.
"""

FILES = {
  "broken.py": "def get_config()\n  pass\n",
  "fails.py": "from igpo_jax.config import default_config\n\n\ndef get_config():\n"
  "  return defualt_config()\n",
  "empty.py": "",
  "notes.txt": "notes\n",
  "prompts.jsonl": '{"prompt": "x"}\n',
  "cut.jsonl": '{"prompt": "x"}\n{"prompt": "y"\n',
  "five.jsonl": '{"prompt": 5}\n',
  "chat.jsonl": '{"messages": ["x"]}\n',
  "hello.jsonl": '{"messages": [{"role": "user", "content": "x"}]}\n',
  "both.jsonl": '{"prompt": "x", "messages": []}\n',
  "hint.jsonl": '{"prompt": "x", "hints": ["eggs@999"]}\n',
  "nothing.jsonl": "",
  "answers.jsonl": '{"question": "q", "completion": "c", "answer": "1"}\n',
  "asked.jsonl": '{"question": "q", "answer": "1"}\n',
  "gold.jsonl": '{"question": "q", "completion": "c", "answer": ""}\n',
}

MISTAKES = {
  "main": (
    "",
    "--config=configs/nowhere.py",
    "--config=configs/quickstart.py:big",
    "--config=configs/illada_8b.py:big",
    "--config=broken.py",
    "--config=fails.py",
    "--config=empty.py",
    "--config=notes.txt",
    "Q --wrkdir=runs/mine",
    "Q sft",
    "Q --config.rl.stepz=3",
    "Q --config.rl=3",
    "Q --config.rl.steps=many",
    "Q --config.rl.steps=-5",
    "Q --config.log.every=-1",
    "Q --config.seed=-1",
    "Q --config.rl.group_size=1",
    "Q --config.rl.micro_batches=3",
    "Q --config.rl.exploration=hint",
    "Q --config.rl_optimizer.learning_rate=nan",
    "Q --config.sampler.block_length=48",
    "Q --config.sampler.steps=131",
    "Q --config.hints.ratio_low=0.9",
    "Q --config.hints.replace_fraction=0.05",
    "Q --config.model.dtype=bfloat",
    "Q --config.model.n_heads=5",
    "Q --config.mesh.data=-2",
    "Q --config.stages=dpo",
    "Q --config.stages=('rl','sft')",
    "Q --config.arms=('GRPO',)",
    "Q --config.arms=('wide:model.d_model=32',)",
    "Q --config.sft.select=best",
    "Q --config.sft.hand_on=best",
    "Q --config.data.prompt_buckets=(32,16)",
    "Q --config.data.rl=",
    "Q --config.data.rl=jsonl:nowhere.jsonl",
    "Q --config.data.rl=nowhere:x",
    "Q --config.data.eval=synthetic:chains",
    "Q --config.eval.protocol=d2",
    "Q --config.init_from=nowhere",
  ),
  "generate": (
    "--prompt=x",
    "--model=model",
    "--model=nowhere --prompt=x",
    "--model=notes.txt --prompt=x",
    "M --promt=x",
    "M --steps=0",
    "M --gen_length=16 --block_length=5",
    "M --temperature=hot",
    "M --temperature=-1",
    "M --threshold=2",
    "M --threshold=0.9 --factor=1",
    "M --cache=big",
    "M --seed=-1",
    "M --dtype=int8",
    "M --prompt_template=x",
    "M --hint=eggs",
    "M --gen_length=8 --hint=eggs@8",
    "M --gen_length=8 --hint=eggs@1 --hint=eggs@1",
    "M --template=a[MASK*x]",
    "M --template=[END]a",
    "M --output=out.jsonl",
    "--model=model --chat --template=x",
    "--model=model --input=prompts.jsonl --animate",
    "--model=model --input=nowhere.jsonl",
    "--model=model --input=nothing.jsonl",
    "--model=model --input=cut.jsonl",
    "--model=model --input=five.jsonl",
    "--model=model --input=chat.jsonl",
    "--model=model --input=both.jsonl",
    "--model=model --input=hint.jsonl",
    "--model=model --input=hello.jsonl --raw",
    "--model=model --input=prompts.jsonl --output=no/out.jsonl",
    "--model=model --input=prompts.jsonl --output=prompts.jsonl",
    "--model=model --input=prompts.jsonl --output=model",
    "--model=model --input=prompts.jsonl --batch_size=0",
  ),
  "report": ("", "--workdir=nowhere", "--workdir=model --output=x.html"),
  "show": ("nowhere", "model", "model --step=0"),
  "replay": (
    "--workdir=nowhere --step=1",
    "--workdir=model --step=zero",
    "--workdir=model --step=1 --edit=hotter",
    "--workdir=model --step=1 --edit=temprature=0",
    "--workdir=model --step=1 --edit=gen_length=8",
    "--workdir=model --step=1 --edit=hint=eggs",
    "--workdir=model --step=1",
  ),
  "chat": ("--model=nowhere", "--model=model --block_length=0"),
  "grade": (
    "--benchmark=aime --generations=answers.jsonl --output=out.jsonl",
    "--benchmark=gsm8k --generations=nowhere.jsonl --output=out.jsonl",
    "--benchmark=gsm8k --generations=nothing.jsonl --output=out.jsonl",
    "--benchmark=gsm8k --generations=asked.jsonl --output=out.jsonl",
    "--benchmark=gsm8k --generations=gold.jsonl --output=out.jsonl",
    "--benchmark=gsm8k --generations=answers.jsonl --output=model",
    "--benchmark=gsm8k --generations=answers.jsonl --output=out.jsonl --timeout=0",
    "--benchmark=gsm8k --generations=answers.jsonl --output=out.jsonl --workers=0",
    "--benchmark=gsm8k --generations=answers.jsonl --output=out.jsonl --extraction=guess",
    "--generations=answers.jsonl --output=out.jsonl",
    "--verifier=chess --generations=answers.jsonl --output=out.jsonl",
    "--verifier=task --generations=answers.jsonl --output=out.jsonl",
    "--verifier=countdown --generations=answers.jsonl --output=out.jsonl",
    "--verifier=exact --plugins=nowhere.py --generations=answers.jsonl --output=out.jsonl",
    "--verifier=exact --plugins=broken.py --generations=answers.jsonl --output=out.jsonl",
  ),
  "rewrite": (
    "",
    "--source=nowhere:x --output=out.jsonl --tokenizer=char --mode=trim",
    "--source=synthetic:chains --output=out.jsonl --tokenizer=nowhere --mode=trim",
    "--source=synthetic:chains --output=out.jsonl --tokenizer=char --mode=trim --max_tokens=1",
    "--source=synthetic:chains --output=out.jsonl --tokenizer=char --mode=trim --rules=latin",
    "--source=synthetic:chains --output=out.jsonl --tokenizer=char --mode=trim --verifier=chess",
    "--source=synthetic:story --output=out.jsonl --tokenizer=char --mode=trim",
    "--source=synthetic:stories --output=out.jsonl --tokenizer=char:stories --mode=trim",
    "--source=synthetic:chains --output=out.jsonl --tokenizer=char --model=m --endpoint=localhost",
  ),
  "convert": (
    "--source=model",
    "--source=nowhere --target=out",
    "--source=model --target=out --threads=0",
    "--source=model --target=out --max_shard_size=big",
    "--source=model --target=out --dtype=int8",
  ),
  "aot": ("Q", "Q --topology=big --layout"),
  "serve": (
    "--model=nowhere",
    "--model=notes.txt",
    "--model=model --port=many",
    "--model=model --slots=0",
    "--model=model --early_stop=batch",
    "--model=model --raw",
  ),
}
CASES = [(name, words) for name, all_words in MISTAKES.items() for words in all_words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with the files that the commands name."""
  root = tmp_path_factory.mktemp("mistakes")
  (root / "configs").symlink_to(REPO / "configs")
  for name, text in FILES.items():
    (root / name).write_text(text)
  make_directory(copy_tiny(root / "model"))
  return root


def words_of(text):
  text = re.sub(r"^Q\b", "--config=configs/quickstart.py", text)
  return re.sub(r"^M\b", "--model=model --prompt=x", text).split()


def accepted(*args):
  """Stands for a training run, which no mistake may begin."""
  raise SystemExit("this was accepted")


@pytest.fixture(scope="module")
def said(folder):
  """What each wrong usage prints: (exit code, standard output, standard error)."""
  out, here, stderr, stdout = {}, os.getcwd(), sys.stderr, sys.stdout
  patch = pytest.MonkeyPatch()
  patch.setattr(train, "train", accepted)
  os.chdir(folder)
  try:
    for name, words in CASES:
      sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
      try:
        with only_built_in():
          cli.run(lambda name=name, words=words: COMMANDS[name].main(words_of(words)))
      except SystemExit as error:
        out[name, words] = error.code, sys.stdout.getvalue(), sys.stderr.getvalue()
  finally:
    patch.undo()
    os.chdir(here)
    sys.stdout, sys.stderr = stdout, stderr
  return out


def error_line(stderr):
  """The one line of an error; before it there may be news of a command that had begun."""
  lines = [line for line in stderr.splitlines() if line]
  errors = [line for line in lines if line.startswith("error: ")]
  news = [line for line in lines if re.match(r"(generate|chat|convert|aot|igpo_jax): ", line)]
  assert len(errors) == 1 and len(news) + 1 == len(lines) and lines[-1] == errors[0], stderr
  return errors[0]


def test_there_are_at_least_60_of_them():
  assert len(CASES) >= 60 and len(set(CASES)) == len(CASES)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), CASES, ids=[f"{n} {w}" for n, w in CASES])
def test_a_mistake_is_one_line_and_code_2(name, words, said, folder):
  code, out, err = said[name, words]
  line = error_line(err)
  assert code == 2 and not out and "Traceback" not in err
  assert str(folder) not in line and len(line) < 400, line


def test_no_mistake_leaves_anything_behind(said, folder):
  expected = {*FILES, "configs", "model"}
  # Python 3.13 keeps the bytecode of a config file beside it.
  assert {path.name for path in folder.iterdir()} - {"__pycache__"} == expected
  assert all((folder / name).read_text() == text for name, text in FILES.items())


def page(said):
  parts = [HEAD]
  for name, all_words in MISTAKES.items():
    parts.append(f"## igpo_jax.{name}\n\n| what was written | what is said |\n|---|---|")
    for words in all_words:
      line = error_line(said[name, words][2]).removeprefix("error: ").replace("|", "\\|")
      parts.append(f"| `{words or '(nothing)'}` | {line.replace('<', '&lt;')} |")
    parts.append("")
  return "\n".join(parts)


def test_the_page_is_up_to_date(said):
  text = page(said)
  if os.environ.get("IGPO_WRITE_DOCS"):
    PAGE.write_text(text)
  assert PAGE.read_text() == text, "IGPO_WRITE_DOCS=1 writes it anew"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [
  ("main", "Q --config.rl.steps=-5"),
  ("generate", "--model=nowhere --prompt=x"),
  ("chat", "--model=nowhere"),
  ("grade", "--benchmark=gsm8k --generations=nothing.jsonl --output=out.jsonl"),
  ("convert", "--source=nowhere --target=out"),
])  # fmt: skip
def test_a_process_says_the_same(name, words, said, folder):
  done = subprocess.run(
    [sys.executable, "-m", f"igpo_jax.{name}", *words_of(words)],
    cwd=folder, text=True, capture_output=True, check=False,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)},
  )  # fmt: skip
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == error_line(said[name, words][2]) + "\n"
