"""What every command shares: one line for a mistake, exit codes, signals, flags, help."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from igpo_jax import aot, chat, cli, flags, generate, grade, rehearse, replay, report, show, usage
from igpo_jax import main as program
from igpo_jax.config import default_config
from igpo_jax.convert import __main__ as convert
from igpo_jax.errors import UserError
from igpo_jax.rewrite import __main__ as rewrite
from igpo_jax.serve import __main__ as serve
from tests.paths import REPO


def raising(error):
  def main():
    raise error

  return main


def wrapped(how):
  """A mistake as libraries wrap it."""
  try:
    try:
      raise UserError("the mistake")
    except UserError as error:
      if how == "from":
        raise RuntimeError("in a library") from error
      if how == "none":
        raise RuntimeError("in a library") from None
      raise RuntimeError("while it was handled") from (KeyError("x") if how == "other" else error)
  except RuntimeError as error:
    return error


@pytest.mark.parametrize(
  ("main", "code", "said"),
  [
    (lambda: None, 0, ""),
    (lambda: 3, 3, ""),
    (raising(UserError("no such\n  file: x")), 2, "error: no such file: x\n"),
    (raising(KeyboardInterrupt()), 130, "interrupted\n"),
    (raising(cli.Terminated()), 143, "terminated\n"),
    (raising(wrapped("from")), 2, "error: the mistake\n"),
    (raising(wrapped("none")), 2, "error: the mistake\n"),
    (raising(wrapped("other")), 2, "error: the mistake\n"),
    (raising(ExceptionGroup("some", [KeyError("x"), wrapped("from")])), 2, "error: the mistake\n"),
    (raising(OSError(28, "No space left on device", "a/b")), 2,
     "error: no space left on the device for a/b: free some, or write elsewhere\n"),
  ],
)  # fmt: skip
def test_exit_codes_and_the_one_line(main, code, said, capsys):
  with pytest.raises(SystemExit) as info:
    cli.run(main)
  assert info.value.code == code
  assert capsys.readouterr().err == said


def test_a_mistake_that_quotes_a_file_is_a_line_that_can_be_read(capsys):
  with pytest.raises(SystemExit):
    cli.run(raising(UserError(f"x={'y' * 100_000}")))
  said = capsys.readouterr().err
  assert said.startswith("error: x=yyy") and said.endswith("y ...\n") and len(said) < 5000


@pytest.mark.parametrize("suppress", [False, True])
def test_a_place_that_was_added_to_a_mistake_is_told(suppress, capsys):
  def main():
    try:
      raise UserError("no such token")
    except UserError as error:
      try:
        raise UserError(f"in.jsonl, line 2: {error}") from (None if suppress else error)
      except UserError as error:
        raise RuntimeError("in a library") from error

  with pytest.raises(SystemExit):
    cli.run(main)
  assert capsys.readouterr().err == "error: in.jsonl, line 2: no such token\n"


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), OSError(5, "I/O"), BrokenPipeError()])
def test_a_bug_keeps_its_traceback(error):
  with pytest.raises(type(error)):
    cli.run(raising(error))


def test_commands_search_for_garbage_seldom_and_leave_it_as_it_was():
  before, found = gc.get_threshold(), []
  gc.set_threshold(700, 10, 10)  # Python's own
  try:
    with pytest.raises(SystemExit):
      cli.run(lambda: found.append(gc.get_threshold()))
    assert found == [cli.SEARCH_AFTER] and found[0][0] >= 10_000
    assert gc.get_threshold() == (700, 10, 10)
  finally:
    gc.set_threshold(*before)


def test_signals_are_given_back():
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with pytest.raises(SystemExit):
    cli.run(lambda: None)
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_bad_option_of_a_plain_command_is_one_line(capsys):
  parser = cli.ArgumentParser(prog="x")
  parser.add_argument("--size", type=int)
  for argv in (["--size=big"], ["--sise=1"], ["--siz=1"]):
    with pytest.raises(SystemExit) as info:
      parser.parse_args(argv)
    assert info.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_options_are_understood_with_hyphens_and_with_underscores():
  parser = cli.ArgumentParser(prog="x")
  parser.add_argument("--max_size", type=int)
  parser.add_argument("--dry-run", action="store_true")
  parser.add_argument("words", nargs="*")
  for argv in (["--max-size=3", "--dry-run", "a-b"], ["--max_size", "3", "--dry_run", "a-b"]):
    args = parser.parse_args(argv)
    assert (args.max_size, args.dry_run, args.words) == (3, True, ["a-b"])
  assert cli.underscored(["--a-b=c-d", "e-f", "--", "--g-h"]) == ["--a_b=c-d", "e-f", "--", "--g-h"]


COMMANDS = {"generate": generate, "chat": chat, "grade": grade, "rewrite": rewrite,
            "convert": convert, "replay": replay, "report": report, "serve": serve,
            "show": show}  # fmt: skip
NUMBERS = [
  (name, action)
  for name, command in COMMANDS.items()
  for action in command.make_parser()._actions
  if action.type in (int, float) or hasattr(action.type, "allowed")
]


@pytest.mark.parametrize(("name", "action"), NUMBERS, ids=[f"{n}{a.dest}" for n, a in NUMBERS])
def test_every_number_of_a_command_declares_its_range_and_is_held_to_it(name, action):
  option = action.option_strings[-1]
  assert hasattr(action.type, "allowed"), f"{name} {option}: which values can it have?"
  allowed = action.type.allowed
  outside = [str(allowed.low if allowed.above else allowed.low - 1), "many", "nan", "inf", ""]
  outside += [str(allowed.high if allowed.below else allowed.high + 1)] * (allowed.high < 1e300)
  for text in outside:
    with pytest.raises(UserError, match=re.escape(f"{option}={text} ")):
      COMMANDS[name].make_parser().parse_args([f"{option}={text}"])


def test_the_numbers_of_commands_that_take_a_config_are_bounded():
  for command in (program, aot, rehearse):
    # A test that parsed a command line in this process leaves its overrides of the config behind.
    for name in [name for name in command.FLAGS if not name.startswith("config.")]:
      parser = command.FLAGS[name].parser
      if parser.syntactic_help in ("an integer", "a number", "a non-negative integer"):
        assert parser.lower_bound is not None, f"{command.__name__} --{name}"


# --- in a process of its own --------------------------------------------------------------


def process(code, **kw):
  """A process that runs `code` as the main function of a command."""
  body = "from igpo_jax import cli\n\ndef main():\n" + textwrap.indent(textwrap.dedent(code), "  ")
  return subprocess.Popen(
    [sys.executable, "-c", f"{body}\ncli.run(main)\n"],
    cwd=REPO, text=True, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
    **{"stdout": subprocess.PIPE, **kw},
  )  # fmt: skip


def test_a_mistake_in_a_thread_ends_the_program():
  running = process(
    """
    import threading, time
    def work():
      raise cli.UserError("in a thread")
    threading.Thread(target=work).start()
    time.sleep(60)
    """
  )
  _, err = running.communicate(timeout=30)
  assert (running.returncode, err) == (2, "error: in a thread\n")


def test_a_bug_in_a_thread_keeps_its_traceback():
  running = process(
    """
    import threading
    thread = threading.Thread(target=lambda: 1 // 0)
    thread.start()
    thread.join()
    """
  )
  _, err = running.communicate(timeout=30)
  assert running.returncode == 0 and "ZeroDivisionError" in err


@pytest.mark.slow
@pytest.mark.parametrize(
  ("number", "code", "word"),
  [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
@pytest.mark.parametrize(
  "work",
  [
    "import time; time.sleep(60)",
    # Compiled code that lets other threads run, as a compilation of a model does.
    "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    # An import whose compiled code no exception may pass, as in jax 0.12.
    "import sys; sys.path.insert(0, {folder!r}); import strict",
  ],
  ids=["python", "compiled", "import"],
)
def test_a_signal_ends_the_program_with_its_code_and_one_word(number, code, word, work, tmp_path):
  module = "import os, time\ntry: time.sleep(60)\nexcept BaseException: os.abort()\n"
  (tmp_path / "strict.py").write_text(module)
  running = process(f"print('ready', flush=True)\n{work.format(folder=str(tmp_path))}")
  assert running.stdout.readline() == "ready\n"
  began = time.monotonic()
  running.send_signal(number)
  _, err = running.communicate(timeout=30)
  assert (running.returncode, err) == (code, f"{word}\n")
  assert time.monotonic() - began < 10


def test_a_full_disk_is_one_line():
  with open("/dev/full", "w") as full:
    running = process("print('x' * 10000)", stdout=full)
    _, err = running.communicate(timeout=30)
  assert running.returncode == 2
  assert err == "error: no space left on the device: free some, or write elsewhere\n"


def test_a_reader_that_goes_away_is_no_traceback():
  running = process("while True: print('x' * 1000)")
  running.stdout.readline()
  running.stdout.close()
  assert running.wait(timeout=30) == 128 + signal.SIGPIPE
  assert running.stderr.read() == ""


# --- flags of the commands that take a config ---------------------------------------------


@pytest.fixture
def config_file(tmp_path):
  """Writes a config file; returns its path."""

  def write(text, name="mine.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return path

  return write


GOOD = '''
  """A config that works.

  Preset: tiny.
  """
  from igpo_jax.config import default_config

  def get_config(preset=""):
    config = default_config()
    config.data.sft = config.data.rl = "synthetic:chains"
    config.rl.steps = 3 if preset == "tiny" else 7
    return config
'''


def parse(*argv):
  return program.parse_flags(["main", *map(str, argv)])[0]


def test_a_preset_and_options_in_any_order_reach_the_config(config_file):
  path = config_file(GOOD)
  assert parse(f"--config={path}").rl.steps == 7
  assert parse("--config.rl.inner-updates=2", f"--config={path}:tiny").rl.steps == 3
  assert parse("--config.rl.inner-updates=2", "--config", path).rl.inner_updates == 2
  config = parse(
    f"--config={path}",
    "--config.stages=rl",
    "--config.data.prompt_buckets=(8, 16)",
    "--config.data.eval=a=synthetic:chains?n=3",
    "--config.sampler.allow_mask",
  )
  assert config.stages == ("rl",) and config.data.prompt_buckets == (8, 16)
  assert config.data.eval == ("a=synthetic:chains?n=3",) and config.sampler.allow_mask
  assert parse(f"--config={path}").rl.inner_updates == 4  # nothing is left of the one before


BAD_FILES = [
  ("raise UserError('my own words')", "^my own words$"),
  ("raise KeyError('x') from UserError('my own words')", "^my own words$"),
  ("return 1 // 0", "mine.py, line 7: ZeroDivisionError: "),
  ("return default_confg()", "mine.py, line 7: NameError: .*default_confg"),
  ("import no_such_module", "mine.py, line 7: ModuleNotFoundError: "),
  ("return", "mine.py: get_config returned None; return a config"),
  (
    "from igpo_jax.options import HintConfig",
    "line 7: igpo_jax.options is igpo_jax.config now: import from there",
  ),
  ("c = default_config(); c.rl.steps = 'many'; return c", "mine.py, line 7: TypeError: "),
  ("return (", "mine.py, line 7: SyntaxError: "),
]


@pytest.mark.parametrize(("line", "complaint"), BAD_FILES, ids=[b for _, b in BAD_FILES])
def test_what_is_wrong_in_a_config_file_is_told_with_its_place(line, complaint, config_file):
  path = config_file(f"""
    from igpo_jax.errors import UserError
    from igpo_jax.config import default_config


    def get_config():
      {line}
  """)
  with pytest.raises(UserError, match=complaint):
    parse(f"--config={path}")


def test_a_config_file_and_its_argument_have_to_fit(config_file):
  with pytest.raises(UserError, match=r"mine\.py has no function get_config"):
    parse(f"--config={config_file('x = 1')}")
  path = config_file("def get_config(): pass")
  with pytest.raises(UserError, match=r"mine.py: get_config takes no argument 'tiny'"):
    parse(f"--config={path}:tiny")
  path = config_file("def get_config(name): pass")
  with pytest.raises(UserError, match=r"mine.py: get_config needs an argument"):
    parse(f"--config={path}")
  with pytest.raises(UserError, match=r"is Python and ends in \.py"):
    parse(f"--config={config_file('', 'mine.yaml')}")


def test_a_module_beside_the_config_file_is_found(config_file):
  config_file("STEPS = 11", "beside_the_config.py")
  path = config_file(GOOD.replace("3 if", "__import__('beside_the_config').STEPS if"))
  assert parse(f"--config={path}:tiny").rl.steps == 11


@pytest.mark.parametrize(
  ("preset", "complaint"),
  [
    ("configs/quickstart.py:big", "no preset 'big'; known: smoke"),
    ("configs/amc.py:data,v6e", "hardware 'v6e' is not one of v5e-64"),
    ("configs/sft_openr1.py:data,v6e", "hardware 'v6e' is not one of v5e-64"),
  ],
)
def test_a_wrong_preset_is_told_in_the_configs_words(preset, complaint, monkeypatch):
  monkeypatch.chdir(REPO)
  with pytest.raises(UserError, match=complaint):
    parse(f"--config={preset}")


def said_by(capsys, *argv):
  with pytest.raises(SystemExit) as info:
    program.main([str(word) for word in argv])
  assert info.value.code == 0
  return capsys.readouterr().out


def test_help_has_every_flag_and_every_option_with_its_default(config_file, capsys):
  text = said_by(capsys, "--help")
  for flag in ("--config=FILE[:ARGUMENT]", "--workdir", "--distributed", "--print_config"):
    assert f"  {flag}" in text
  known = list(usage.options())
  assert len(known) > 100
  for option in known:
    assert f"\n  {option.name} = {option.default!r}    ({option.kind})\n" in text
  told = said_by(capsys, f"--config={config_file(GOOD)}:tiny", "--help")
  assert "Preset: tiny." in told
  assert "  rl.steps = 3    (a whole number, at least 0; default 100)\n" in told


def test_help_names_what_is_registered_and_what_the_config_file_registers(config_file, capsys):
  def known(*argv):
    """What may be named, as --help says it: verifiers, protocols."""
    text = " ".join(said_by(capsys, *argv).split())
    return [set(names.split(", ")) for names in re.findall(r"Known: ([^.]*)\.", text)]

  built_in = {"countdown", "exact", "math", "sudoku", "task"}, {"igpo", "d1", "opencompass_block"}
  verifiers, protocols = known("--help")
  assert built_in[0] <= verifiers and built_in[1] <= protocols  # and what other tests registered
  own = """
  from igpo_jax.config import SamplerConfig
  from igpo_jax.eval.protocols import Setting, register_protocol
  from igpo_jax.rewards.score import Verdict, register_verifier

  register_verifier("always")(lambda completion, record: Verdict(True, completion, "ok"))
  register_protocol("brief", {"test": Setting(SamplerConfig(8, 8, 8))})
"""
  file = config_file(GOOD + own)
  assert known(f"--config={file}:tiny", "--help") == [
    verifiers | {"always"},
    protocols | {"brief"},
  ]


def test_the_config_is_printed_as_the_workdir_will_hold_it(config_file, capsys):
  path = config_file(GOOD)
  text = said_by(capsys, f"--config={path}:tiny", "--config.rl.inner_updates=2", "--print-config")
  config = json.loads(text)
  assert config["rl"]["steps"] == 3 and config["rl"]["inner_updates"] == 2
  assert set(config) == set(default_config())


def test_flags_with_a_mistake_point_to_what_was_meant(config_file):
  path = config_file(GOOD)
  for word, complaint in (
    ("--wrkdir=x", "there is no flag --wrkdir; did you mean workdir"),
    ("--config.rl.step=3", "no option 'rl.step'; did you mean rl.steps"),
    ("--config.rl=3", "--config.rl is a section: give --config.rl.OPTION"),
    ("--config.rl.steps=1.5", "--config.rl.steps=1.5: should be a whole number, at least 0"),
    ("--config.rl.steps=", "--config.rl.steps=: should be a whole number"),
    ("--config.log.wandb=maybe", "--config.log.wandb=maybe: should be True or False"),
    ("--config.rl.steps", "Missing value for flag --config.rl.steps"),
    ("--distributed=maybe", "--distributed=maybe"),
    ("--config.eval.lengths=a b", "--config.eval.lengths=a b: should be a tuple, each"),
  ):
    with pytest.raises(UserError, match=complaint):
      parse(f"--config={path}", word)
  assert flags.load(str(path))[1].stem == "mine"
