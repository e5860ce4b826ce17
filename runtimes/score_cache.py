"""Scores of tokenised pairs that were scored before, for the pairs of later requests."""

import hashlib
import math
import threading
from collections import OrderedDict

from ettin.runtimes.batch import Ids


class ScoreCache:
    """The most recently used scores of one engine. Safe to use from several threads.

    Args:
        entries: maximum number of scores, about 200 bytes each; 0: none are kept.
    """

    def __init__(self, entries: int = 0) -> None:
        self.entries = entries
        self.hits = self.misses = 0
        self._scores: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, ids: Ids) -> float | None:
        """The raw logit of a pair, by its token ids; None: not known."""
        if not self.entries:
            return None
        key = _key(ids)
        with self._lock:
            score = self._scores.get(key)
            if score is None:
                self.misses += 1
            else:
                self.hits += 1
                self._scores.move_to_end(key)
            return score

    def put(self, ids: Ids, score: float) -> None:
        """Keeps a finite score, in place of the one that was not used for the longest time."""
        if self.entries and math.isfinite(score):
            with self._lock:
                self._scores[_key(ids)] = score
                while len(self._scores) > self.entries:
                    self._scores.popitem(last=False)


def _key(ids: Ids) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
