"""Sizes and lengths of time as a user reads them."""

from __future__ import annotations

import pytest

from igpo_jax.io.amounts import in_bytes, in_time


@pytest.mark.parametrize(
  ("size", "words"),
  [
    (0, "0 B"),
    (999, "999 B"),
    (999_936, "1 MB"),
    (1500, "1.5 kB"),
    (16.2e9, "16.2 GB"),
    (5e16, "5e+04 TB"),
  ],
)
def test_sizes_are_in_words(size, words):
  assert in_bytes(size) == words


@pytest.mark.parametrize(
  ("seconds", "words"),
  [
    (0, "0 s"),
    (0.1, "0.1 s"),
    (45.2, "45.2 s"),
    (119, "119 s"),
    (450, "7.5 min"),
    (11_520, "3.2 h"),
    (9e5, "10.4 days"),
  ],
)
def test_lengths_of_time_are_read_at_a_glance(seconds, words):
  assert in_time(seconds) == words
