"""What the HTTP service accepts from its clients."""

from dataclasses import dataclass

PROBES = ("/health", "/health/live", "/health/ready")  # answered even when no other request is


@dataclass(frozen=True)
class Limits:
    """Limits of the HTTP service.

    Args:
        max_body_bytes: size of one request body.
        total_body_bytes: size of all request bodies in memory, from their first byte to their answer.
        max_documents: documents in one request.
        max_text_characters: characters in one query or document.
        max_request_characters: characters in all texts of one request.
        max_connections: requests in progress; idle connections are closed, oldest first, to make room.
        header_timeout_s: for a whole request header to arrive.
        body_timeout_s: for a whole body to arrive, or for the client to read an answer.
        probe_timeout_s: for the engine to score one pair before `/health/live` answers 503.
    """

    max_body_bytes: int = 32 << 20
    total_body_bytes: int = 128 << 20
    max_documents: int = 10_000
    max_text_characters: int = 1_000_000
    max_request_characters: int = 32 << 20
    max_connections: int = 512
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    probe_timeout_s: float = 10.0
