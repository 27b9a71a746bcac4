"""The masked diffusion transformer, as pure functions.

`make_lm(config)` makes one. A model family is a folder of this room and a line of
`families.FAMILIES`; the network that they share is `network`.
"""

from igpo_jax.models.families import FAMILIES, make_lm

__all__ = ["FAMILIES", "make_lm"]
