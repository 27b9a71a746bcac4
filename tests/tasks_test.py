"""Generated tasks: the records that they give, one registration each, right answers."""

from __future__ import annotations

import hashlib
import json

import pytest

from igpo_jax.data.sources import load_records


def digest(records) -> str:
  """Of everything that a run learns from a record, in order."""
  rows = [[r.id, r.prompt, r.trace, r.answer, r.answer_span] for r in records]
  return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
  ("uri", "expected"),
  [
    ("synthetic:chains?n=300", "97c75643412add59"),
    ("synthetic:?n=50&split=test&seed=3", "f3d1ec60b35f3319"),
    ("synthetic:chains?min_steps=6&max_steps=6&rare=add&split=train&n=300&seed=1"
     "&rare_share=0.3&skip_share=0.65", "4236344c1d47134c"),
    ("synthetic:chains?min_steps=4&max_steps=4&rare=add&rare_share=0.25&n=100&detours=1",
     "7919c914ecb10349"),
    ("synthetic:chains?digits=2&ops=add,sub&rare=max&n=100&split=test&seed=5",
     "730ddf44ea597314"),
    ("synthetic:maps?n=300", "16b79014f208cf3e"),
    ("synthetic:maps?steps=10&maps=4&table=3&n=300&split=test&seed=2", "3dae0143bab3b237"),
    ("synthetic:maps?steps=8&doubtful=0.2&slips=0.8&noise=0.1&detours=1&n=200&seed=4",
     "63ea424c299364fa"),
  ],
)  # fmt: skip
def test_a_uri_gives_the_records_it_always_gave(uri, expected):
  """Published numbers name these URIs: another record would be another experiment."""
  assert digest(load_records(uri).records) == expected
