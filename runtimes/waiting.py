"""The requests in progress, in the order in which they should be done, and how batches are chosen from them."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from itertools import count

from ettin.artifacts.errors import Busy
from ettin.runtimes.batch import BatchLimits, Ids, round_up
from ettin.runtimes.request import Request

_FIRST_SPEED = 20_000.0  # tokens/s, until measured
_LARGE = 8  # times the limit of waiting pairs: so many are refused, whatever is scored first
_CHOICE = 4  # batches' worth of pairs to choose from: as little padding as with 32, and requests end in order

Chosen = list[tuple[Request, Ids, int]]  # a request, the ids of one of its pairs, and the pair's place in the request
Entry = tuple[float, int, Request]  # time at which the request is due, number of its arrival


class Waiting:
    """The requests in progress, ordered by `Request.due_s` as it was when they last changed.

    No method looks at all of them but `refusal`, so thousands can wait at little cost. The scheduler's lock guards
    everything here. `tokens_per_s` is the speed of the engine, which the scheduler measures.
    """

    def __init__(self) -> None:
        self.tokens_per_s = _FIRST_SPEED
        self.pairs = 0  # not scored yet, each chunk counted
        self.to_tokenise: list[Entry] = []  # requests whose next pairs a thread should tokenise
        self.to_score: list[Entry] = []  # requests of which tokenised pairs wait
        self._entries: dict[Request, Entry] = {}
        self._deadlines: list[Entry] = []  # with the deadline instead of the due time
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request: Request) -> bool:
        return request in self._entries

    def __iter__(self) -> Iterator[Request]:
        return iter(self._entries)

    @property
    def expiry_s(self) -> float:
        """Monotonic time of the next deadline."""
        return self._deadlines[0][0] if self._deadlines else float("inf")

    def refusal(self, request: Request, limit: int | None, queue_s: float) -> Busy | None:
        """Why there is no room for a new request.

        Args:
            request: not added yet.
            limit: number of waiting pairs that are scored before the request; None: there is always room.
            queue_s: seconds that all waiting pairs will take.
        """
        if limit is None or self.pairs < limit:
            return None
        due_s, entries = request.due_s(self.tokens_per_s), self._entries.values()
        ahead = sum(other.left for other_s, _, other in entries if other_s <= due_s)
        if ahead >= limit:
            seconds = queue_s * ahead / max(1, self.pairs)
            return Busy(f"{ahead} pairs are waiting before this request, limit {limit}", seconds)
        # Requests that each have a little less work than the one before would all be accepted otherwise.
        if self.pairs >= _LARGE * limit:
            return Busy(f"{self.pairs} pairs are waiting, limit {_LARGE * limit}", queue_s)
        return None

    def add(self, request: Request) -> None:
        """Adds a new request."""
        number = next(self._numbers)
        self._entries[request] = request.due_s(self.tokens_per_s), number, request
        if request.deadline_s != float("inf"):
            insort(self._deadlines, (request.deadline_s, number, request))
        self.pairs += len(request.pairs)
        self._file(request)

    def update(self, request: Request) -> None:
        """Moves a request, which may have ended meanwhile, to where it belongs after a change."""
        if request in self._entries:
            number = self._unfile(request)
            self._entries[request] = request.due_s(self.tokens_per_s), number, request
            self._file(request)

    def remove(self, request: Request) -> None:
        """Removes a request that has ended."""
        number = self._unfile(request)
        del self._entries[request]
        _discard(self._deadlines, (request.deadline_s, number, request))
        self.pairs -= request.left

    def next(self, queue: list[Entry], now_s: float) -> Request | None:
        """A request that has expired, or else the first of `to_tokenise` or `to_score`; None: there is none."""
        entries = self._deadlines if self.expiry_s <= now_s else queue
        return entries[0][2] if entries else None

    def next_batch(self, first: Request, limits: BatchLimits) -> Chosen:
        """Takes the longest pair of `first`, and the longest pairs of all requests that fit beside it.

        Args:
            first: the request that is next; it has waiting pairs.
            limits: the batches that the engine takes.
        """
        width = round_up(first.lengths[-1], limits.length_multiple)
        sizes = (max(1, self._budget_tokens(limits) // width), limits.batch_pairs, first.batch_pairs)
        count = min(size for size in sizes if size is not None)
        chosen = [first.take(len(first.lengths) - 1)]
        offers: list[tuple[int, int, Request]] = []
        for _, _, request in self.to_score:
            if len(offers) >= _CHOICE * (count - 1):
                break
            if (request.batch_pairs or count) < count:
                continue
            end = bisect_right(request.lengths, width)
            offers += [(request.lengths[index], index, request) for index in range(max(0, end - count + 1), end)]
        best = sorted(offers, key=lambda offer: -offer[0])[: count - 1]
        # From the end of each request, so that the other indices stay valid.
        chosen += [request.take(index) for _, index, request in sorted(best, key=lambda offer: -offer[1])]
        for request in requests_of(chosen):
            self.update(request)
        return chosen

    def _budget_tokens(self, limits: BatchLimits) -> int:
        """Token budget of a batch; if little work waits, it is divided among the streams."""
        if not limits.in_parallel or limits.concurrency == 1:
            return limits.batch_tokens
        tokens = 0
        for _, _, request in self.to_score:
            tokens += max(request.waiting_tokens, len(request.lengths) * limits.length_multiple)  # with padding
            if tokens >= limits.batch_tokens * limits.concurrency:
                break
        return min(limits.batch_tokens, -(-tokens // limits.concurrency))

    def _file(self, request: Request) -> None:
        if request.has_room and not request.caller_tokenises:
            insort(self.to_tokenise, self._entries[request])
        if request.has_pairs:
            insort(self.to_score, self._entries[request])

    def _unfile(self, request: Request) -> int:
        entry = self._entries[request]
        _discard(self.to_tokenise, entry)
        _discard(self.to_score, entry)
        return entry[1]


def _discard(entries: list[Entry], entry: Entry) -> None:
    index = bisect_left(entries, entry)
    if entries[index : index + 1] == [entry]:
        del entries[index]


def requests_of(chosen: Chosen) -> list[Request]:
    """The requests whose pairs these are, each once."""
    return list(dict.fromkeys(request for request, _, _ in chosen))
