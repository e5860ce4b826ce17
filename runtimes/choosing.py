"""Which pairs of all waiting requests form the next batch."""

from bisect import bisect_right
from collections.abc import Sequence

from ettin.runtimes.batch import BatchLimits, Ids, round_up
from ettin.runtimes.request import Request

_CHOICE = 4  # batches' worth of pairs to choose from: as little padding as with 32, and requests end in order

Chosen = list[tuple[Request, Ids, int]]


def next_batch(first: Request, requests: Sequence[Request], limits: BatchLimits) -> Chosen:
    """Takes the longest pair of `first`, and the longest pairs of all requests that fit beside it.

    Args:
        first: the request that is next; pairs of it wait.
        requests: all requests, in the order in which they should be done.
        limits: the batches that the engine takes.

    Returns:
        Request, ids and place of each pair; the pairs do not wait any more.
    """
    width = round_up(first.lengths[-1], limits.length_multiple)
    sizes = (max(1, _budget_tokens(requests, limits) // width), limits.batch_pairs, first.batch_pairs)
    count = min(size for size in sizes if size is not None)
    chosen = [first.take(len(first.lengths) - 1)]
    offers: list[tuple[int, int, Request]] = []
    for request in requests:
        if len(offers) >= _CHOICE * (count - 1):
            break
        if not request.has_pairs or (request.batch_pairs or count) < count:
            continue
        end = bisect_right(request.lengths, width)
        offers += [(request.lengths[index], index, request) for index in range(max(0, end - count + 1), end)]
    best = sorted(offers, key=lambda offer: -offer[0])[: count - 1]
    # From the end of each request, so that the other indices stay what they are.
    return chosen + [request.take(index) for _, index, request in sorted(best, key=lambda offer: -offer[1])]


def _budget_tokens(requests: Sequence[Request], limits: BatchLimits) -> int:
    """Token budget of a batch: little work is divided among the streams."""
    if not limits.in_parallel or limits.concurrency == 1:
        return limits.batch_tokens
    pairs = sum(len(request.lengths) for request in requests)
    tokens = sum(request.waiting_tokens for request in requests)
    waiting_tokens = max(tokens, pairs * limits.length_multiple)  # as padding counts them, roughly
    return min(limits.batch_tokens, -(-waiting_tokens // limits.concurrency))


def requests_of(chosen: Chosen) -> list[Request]:
    """The requests whose pairs these are, each once."""
    return list(dict.fromkeys(request for request, _, _ in chosen))
