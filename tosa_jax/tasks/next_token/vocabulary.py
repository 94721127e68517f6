"""Label names as sequences of tokens, and back: a vocabulary that is made of the names alone.

The first token of a label is its shortest beginning that no other label has, then come what is left of that word and
the words after it, each with the space before it, and an end token closes it. One-shot sampling writes one label for
each first token. With words alone it could write only one of "grey fox" and "grey wolf", which begin with the tokens
"grey f" and "grey w" here. Characters would spell any label, but the loss would be that of spelling: of "Sneaker" one
token in seven says what the image shows.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from tosa_jax.models.vit_config import check

END = 0
"""The token after a label's last one; decoders also read it before the first one."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of some labels. The same labels, in any order, give the same tokens.

    labels  their names, in the order of the data set's classes.

    Raises ConfigError: there are no labels, or one is empty or there twice.
    """

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        check(
            len(self.labels) > 0,
            "labels is empty: set config.model.labels, or labels= of create_model, to the names of the data set's "
            "labels, in their order, for example ('cat', 'dog')",
        )
        for label in self.labels:
            check(label != "", f"labels={self.labels} has one without a name: name every label")
            check(self.labels.count(label) == 1, f"labels has {label!r} twice: give it once")

    @functools.cached_property
    def tokens(self) -> tuple[str, ...]:
        """The text of each token; that of `END` is empty."""
        return "", *sorted({piece for label in self.labels for piece in self._pieces(label)})

    def _pieces(self, label: str) -> list[str]:
        others = [other for other in self.labels if other != label]
        ends = range(1, len(label) + 1)
        own = (i for i in ends if not any(other.startswith(label[:i]) for other in others))
        first = next(own, len(label))
        return [label[:first], *re.findall(r"\s*\S+|\s+", label[first:])]

    @functools.cached_property
    def table(self) -> Int[np.ndarray, "c t"]:
        """The tokens of each label; `END` closes it, and fills the row."""
        rows = [[self.tokens.index(piece) for piece in self._pieces(x)] for x in self.labels]
        length = max(map(len, rows)) + 1
        return np.array([row + [END] * (length - len(row)) for row in rows], np.int32)

    @property
    def size(self) -> int:
        """How many tokens there are: v."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of the longest label, its end included: t."""
        return self.table.shape[1]

    @functools.cached_property
    def written(self) -> Bool[np.ndarray, "c t"]:
        """Which entries of `table` are tokens of the label, its end included."""
        return np.cumsum(self.table == END, axis=1) - (self.table == END) == 0

    def text(self, tokens: Iterable[Any]) -> str | None:
        """What tokens spell, up to their end; None without an end.

        >>> names = Vocabulary(("Sandal", "Shirt"))
        >>> names.tokens, names.text([1, 4, 0])
        (('', 'Sa', 'Sh', 'irt', 'ndal'), 'Sandal')
        """
        tokens = [int(token) for token in tokens]
        if END not in tokens:
            return None
        return "".join(self.tokens[token] for token in tokens[: tokens.index(END)])

    @functools.cached_property
    def _letters(self) -> Int[np.ndarray, "v p"]:
        """The characters of each token as numbers from 1; 0 fills the row."""
        alphabet = sorted(set("".join(self.labels)))
        rows = [[alphabet.index(x) + 1 for x in token] for token in self.tokens]
        width = max(map(len, rows))
        return np.array([row + [0] * (width - len(row)) for row in rows], np.int32)

    def spelled(self, tokens: Int[Array, "m t"]) -> Int[Array, "m s"]:
        """The characters that tokens spell up to their end, as numbers: rows are equal where the texts are.

        Of texts that are longer than every label the rest is cut off; they still differ from each label.
        """
        ended = jnp.cumsum(tokens == END, axis=1) > 0
        letters = jnp.where(ended[:, :, None], 0, jnp.asarray(self._letters)[tokens])
        lengths = (letters > 0).sum(axis=2)
        starts = jnp.cumsum(lengths, axis=1) - lengths
        longest = max(map(len, self.labels)) + 1
        places = starts[:, :, None] + jnp.arange(letters.shape[2])[None, None]
        places = jnp.where(letters > 0, places, longest)
        rows = jnp.arange(len(tokens))[:, None, None]
        text = jnp.zeros((len(tokens), longest), jnp.int32)
        return text.at[rows, places].set(letters, mode="drop")

    def label_of(self, tokens: Int[Array, "m t"]) -> tuple[Bool[Array, "m c"], Bool[Array, "m m"]]:
        """Which label each row of tokens spells, and which rows spell the same text.

        Strings are compared, not tokens. Rows without an end spell no label, and not the same as another.
        """
        text, own = self.spelled(tokens), self.spelled(jnp.asarray(self.table))
        ended = (tokens == END).any(axis=1)
        labels = (text[:, None] == own[None]).all(axis=2) & ended[:, None]
        same = (text[:, None] == text[None]).all(axis=2) & ended[:, None] & ended[None]
        return labels, same


def shifted(text: Shaped[Array, "b m t"]) -> Shaped[Array, "b m t"]:
    """What a decoder reads to write `text`: `END`, then all tokens but the last."""
    return jnp.pad(text[:, :, :-1], ((0, 0), (0, 0), (1, 0)), constant_values=END)
