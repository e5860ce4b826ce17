"""Whether the server works: one pair is scored now and then, beside the queue of requests."""

import asyncio
import time
from http import HTTPStatus

from ettin.artifacts.errors import Busy
from ettin.runtimes.serving.answers import LOG, Refused, clipped
from ettin.runtimes.serving.backends import Backend

_KEEP_S = 1.0  # a result is used again for this time
_WAIT_S = 1.0  # for a probe before the last result is used


class Health:
    """Liveness and readiness. For one event loop.

    Liveness is lost when neither the probe nor any batch of requests has ended for `timeout_s`, or when the probe
    fails. A busy engine stays alive: a batch that ends counts as much as the probe.

    Args:
        backend: scores the probe; at most one is in flight.
        timeout_s: see above.

    Attributes:
        is_draining: the server was told to stop.
    """

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self.is_draining = False
        self._backend, self._timeout_s = backend, timeout_s
        self._probe: asyncio.Task[None] | None = None
        self._failure = ""
        self._probe_began_s = self._probe_ended_s = self._queue_began_s = self._batch_s = -_KEEP_S
        self._batches, self._had_queue = 0.0, False

    async def check_live(self) -> None:
        """Scores a pair, or uses a result that is at most a second old.

        Raises:
            Refused: 503, the engine is stuck or fails.
        """
        if self._probe is None and time.monotonic() - self._probe_ended_s >= _KEEP_S:
            self._probe_began_s = time.monotonic()
            self._probe = asyncio.create_task(self._score_one())
        if self._probe is not None:
            await asyncio.wait({self._probe}, timeout=min(_WAIT_S, self._timeout_s))
        silent_s = self._silent_s()
        if silent_s > self._timeout_s:
            raise _unhealthy(f"the engine has scored nothing for {silent_s:.0f} s")
        if self._failure:
            raise _unhealthy("the engine failed to score a pair; the log has the reason")

    def _silent_s(self) -> float:
        """Time since the engine last did something of what it has to do."""
        now, counters = time.monotonic(), self._backend.counters
        has_queue, batches = bool(counters.get("waiting_pairs")), counters.get("batches", 0.0)
        if batches != self._batches:
            self._batch_s, self._batches = now, batches
        if has_queue and not self._had_queue:
            self._queue_began_s = now
        self._had_queue = has_queue
        work = [self._probe_began_s] * (self._probe is not None) + [self._queue_began_s] * has_queue
        return now - max(min(work), self._batch_s) if work else 0.0

    async def check_ready(self) -> None:
        """Whether a load balancer should send requests here. A full queue does not count: it answers 429 by itself.

        Raises:
            Refused: 503, the server drains, or its model is not ready or not alive.
        """
        if self.is_draining:
            raise _unhealthy("the server is stopping")
        await self.check_model()
        await self.check_live()

    async def check_model(self) -> None:
        """Whether the model is loaded.

        Raises:
            Refused: 503, it is not.
        """
        if not await self._backend.is_ready():
            raise _unhealthy("the model is not ready")

    async def _score_one(self) -> None:
        try:
            await self._backend.probe()
            self._failure = ""
        except Busy:  # it answers
            self._failure = ""
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            self._failure = clipped(f"{type(error).__name__}: {error}", 1000)
            LOG.error("liveness: %r", self._failure)
        finally:
            self._probe_ended_s, self._probe = time.monotonic(), None


def _unhealthy(why: str) -> Refused:
    return Refused(HTTPStatus.SERVICE_UNAVAILABLE, why, "unhealthy")
