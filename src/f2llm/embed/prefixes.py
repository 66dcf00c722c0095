"""Which token sequences are worth computing behind a prefix that they share, such as the instruction of queries.

A token sees earlier tokens alone, so what a prefix leaves to those behind it (keys and values of every layer) is the
same whatever follows: it is computed once for all sequences of a batch, and kept for the next batches. The prefix is
found among the token ids themselves, as the longest one that sequences have in common: where the prompt ends and a
text begins is not a border of tokens, because the last space of the prompt belongs to the text's first word.

A prefix costs a batch of its own, and a batch reads all weights once, whatever its size: so it has to save MIN_SAVED
tokens, unless all sequences have it.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from threading import Lock
from typing import Any

SHORTEST = 8  # tokens of a prefix
LONGEST = 128  # tokens of a sequence that is computed behind one; in longer ones a prefix is a small part
MIN_SAVED = 64  # tokens
KEPT = 16  # prefixes, those used last

Tokens = tuple[int, ...]
Group = tuple[Tokens, list[int]]  # a prefix, which may be empty, and the numbers of the sequences behind it


class Prefixes:
    """The prefixes that were used last, each computed when it is first needed. Safe to use from several threads."""

    def __init__(self, compute: Callable[[Tokens], Any]) -> None:
        self._compute = compute
        self._kept: OrderedDict[Tokens, Any] = OrderedDict()
        self._lock = Lock()

    def offer(self, prefix: Tokens) -> None:
        """Tell of a prefix that will be met again, such as a prompt."""
        if SHORTEST <= len(prefix) < LONGEST:
            self._keep(prefix, self._kept.get(prefix))

    def state(self, prefix: Tokens) -> Any:
        """What the sequences behind it need, as `compute` gives it."""
        state = self._kept.get(prefix) or self._compute(prefix)
        self._keep(prefix, state)
        return state

    def groups(self, sequences: Sequence[Tokens]) -> list[Group]:
        """Every sequence in one group, of prefixes that are shared or known; those behind none come first."""
        with self._lock:
            known = list(self._kept)
        short = sorted((i for i, s in enumerate(sequences) if len(s) < LONGEST), key=sequences.__getitem__)
        found = _with_known(sequences, _shared([sequences[i] for i in short], short), known)
        worth = [
            group for group in found if _saved(group, known) >= MIN_SAVED or len(group[1]) == len(sequences)
        ]
        behind = {i for _, members in worth for i in members}
        alone = [i for i in range(len(sequences)) if i not in behind]
        return [((), alone), *worth] if alone else worth

    def _keep(self, prefix: Tokens, state: Any) -> None:
        with self._lock:
            self._kept[prefix] = state
            self._kept.move_to_end(prefix)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)


def _shared(sorted_sequences: Sequence[Tokens], numbers: Sequence[int]) -> Iterator[Group]:
    """Neighbours in alphabetical order, cut into runs so that most tokens are saved in all; a run may be of one.

    Of an interval, what all have in common is the least that two neighbours have, and the way to divide it is between
    those who have the least: so intervals form a tree, and each either is a run or is divided.
    """
    common = [in_common(a, b) for a, b in pairwise(sorted_sequences)]

    def best(first: int, last: int) -> tuple[int, list[tuple[int, int]]]:
        """Tokens saved in the interval, ends included, and its runs."""
        if first == last:
            return 0, [(first, last)]
        least = min(common[first:last])
        together = least * (last - first) if least >= SHORTEST else 0
        borders = [i for i in range(first, last) if common[i] == least]
        parts = [best(a + 1, b) for a, b in pairwise([first - 1, *borders, last])]
        apart = sum(saved for saved, _ in parts)
        return (
            (together, [(first, last)])
            if together > apart
            else (apart, [run for _, runs in parts for run in runs])
        )

    for first, last in best(0, len(sorted_sequences) - 1)[1] if sorted_sequences else ():
        length = min(common[first:last], default=0)
        yield sorted_sequences[first][:length], list(numbers[first : last + 1])


def _with_known(sequences: Sequence[Tokens], found: Iterator[Group], known: Sequence[Tokens]) -> list[Group]:
    """Sequences that share no prefix with others are put behind the longest known one that they begin with."""
    members: dict[Tokens, list[int]] = {}
    longest_first = sorted(known, key=len, reverse=True)
    for prefix, numbers in found:
        if len(prefix) < SHORTEST:
            first = sequences[numbers[0]]
            fits = (p for p in longest_first if len(p) < len(first) and first[: len(p)] == p)
            prefix = next(fits, ())
        if prefix:
            members.setdefault(prefix, []).extend(numbers)
    return list(members.items())


def _saved(group: Group, known: Sequence[Tokens]) -> int:
    """Tokens that need not be computed."""
    prefix, members = group
    return len(prefix) * (len(members) - (prefix not in known))


def in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with, leaving at least one behind them."""
    most = min(len(a), len(b)) - 1
    return next((i for i in range(most) if a[i] != b[i]), max(most, 0))
