"""What the site has beside docs/ (mkdocs.yml): the page of options, from the config itself."""

import re

HEAD = """# Options

Every option of a config, from the dataclasses in `igpo_jax/config/`. In a config file
`config.rl.steps = 100`, on the command line `--config.rl.steps=100`. `python -m igpo_jax.main
--help` prints the same list, with `--config=FILE` beside what FILE sets.
"""


def page() -> str:
  """The page, as Markdown: a table for each section."""
  from igpo_jax.plugins import values_of
  from igpo_jax.usage import options

  sections = {}
  for option in options():
    section, _, name = option.name.rpartition(".")
    known = ", ".join(values_of(option.name))
    text = f"{option.text} Known: {known}." if known else option.text
    cells = (f"`{name}`", option.kind, f"`{option.default!r}`", text[:1].upper() + text[1:])
    row = " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    sections.setdefault(section, []).append(f"| {row} |")
  lines = [HEAD]
  for section, rows in sections.items():
    lines += [f"\n## {section or 'Of the run'}\n", "| option | values | default | meaning |"]
    lines += ["|---|---|---|---|", *rows]
  return "\n".join(lines) + "\n"


def on_files(files, config):
  """Adds options.md to the pages of the site."""
  from mkdocs.structure.files import File

  files.append(File.generated(config, "options.md", content=page()))
  return files


def on_page_markdown(markdown, page, config, files):
  """Names files of the repository that are not of the site, instead of linking them."""
  return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)
