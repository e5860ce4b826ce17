"""Limits of `ettin-serve`. Each is described once: the command makes its options from the fields of `Limits`."""

import sys
from dataclasses import dataclass, field
from typing import Any

from ettin.artifacts.errors import UsageError

SPARE_CONNECTIONS = 64  # beyond the limit of requests: for health checks and for clients that are told to come again
BACKLOG = 128  # connections that the kernel holds until they are accepted
ACCEPTED_AT_ONCE = 16  # connections that one round of the event loop accepts
_UNCOUNTED_CONNECTIONS = 4 * ACCEPTED_AT_ONCE  # asyncio counts and closes a connection up to four rounds later
_OTHER_FILES = 64  # files that the engine and Python open


def _limit(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """Limits of the HTTP service. The help text of each field says what the limit is for.

    Raises:
        UsageError: one request body may be larger than all of them together.
    """

    max_documents: int = _limit(10_000, "Maximum number of documents in one request.")
    max_text_characters: int = _limit(1_000_000, "Maximum number of characters in one query or document.")
    max_request_characters: int = _limit(32 << 20, "Maximum number of characters in all texts of one request.")
    max_body_mib: int = _limit(32, "Maximum size of one request body, in MiB.")
    total_body_mib: int = _limit(
        128,
        "Maximum size of all request bodies in memory, in MiB. Beyond it, the body that has been arriving for the "
        "longest time is refused with 503.",
    )
    max_waiting_pairs: int = _limit(
        8192,
        "Maximum number of pairs that wait and are served before a new request, before the server answers it with 429.",
    )
    max_connections: int = _limit(
        512,
        "Maximum number of requests in progress before the server answers 503. Health checks do not count, and idle "
        "connections are closed to make room.",
    )
    header_timeout_s: float = _limit(
        10.0, "Time in seconds for a request's header to arrive before the connection is closed."
    )
    body_timeout_s: float = _limit(
        30.0,
        "Time in seconds for a request's body to arrive before the server answers 408, and for a client to read an "
        "answer.",
    )
    request_timeout_s: float | None = _limit(
        None, "Time in seconds for a request to be scored before the server answers 504.  [default: no limit]"
    )
    probe_timeout_s: float = _limit(10.0, "Time in seconds without a scored batch before /health/live answers 503.")
    cached_scores: int = _limit(
        0, "Number of scores that are kept for requests with equal pairs, about 200 bytes each; 0: none."
    )
    drain_s: float = _limit(
        0.0, "Time in seconds after SIGTERM in which requests are still accepted and /health/ready answers 503."
    )

    def __post_init__(self) -> None:
        if self.total_body_mib < self.max_body_mib:
            raise UsageError(
                f"--total-body-mib is {self.total_body_mib}, expected at least --max-body-mib, {self.max_body_mib}"
            )

    @property
    def max_body_bytes(self) -> int:
        """Size of one request body."""
        return self.max_body_mib << 20

    @property
    def total_body_bytes(self) -> int:
        """Size of all request bodies in memory, each from its first byte to its answer."""
        return self.total_body_mib << 20

    def raise_file_limit(self) -> None:
        """Lets this process open as many files as the system allows it.

        Raises:
            UsageError: the system allows fewer than the connections need.
        """
        if sys.platform == "win32":  # has no such limit
            return
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        needed = self.max_connections + SPARE_CONNECTIONS + _UNCOUNTED_CONNECTIONS + _OTHER_FILES
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UsageError(
                f"--max-connections {self.max_connections} needs {needed} open files, the limit of this process is "
                f"{hard}. Lower it, or raise the limit: ulimit -n {needed} (LimitNOFILE= in systemd)"
            )
