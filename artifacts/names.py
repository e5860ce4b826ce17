"""Names and lines that can be printed and mean nothing else. Needs no package."""

MAX_NAME_BYTES = 200


def one_line(text: str) -> str:
    """A text without control characters and line breaks.

    Raises:
        ValueError: it has some.
    """
    if not text.isprintable():
        raise ValueError("holds control characters or line breaks")
    return text


def checked_file_name(text: str) -> str:
    """A name that is one part of a path, and can't be taken for an option or a hidden file.

    Raises:
        ValueError: it is not.
    """
    if not text or text.startswith((".", "-")) or "/" in text or "\\" in text or len(text.encode()) > MAX_NAME_BYTES:
        raise ValueError(
            f"'{text[:40]}' can't name a file: it is empty, begins with '.' or '-', holds '/' or '\\', or has more "
            f"than {MAX_NAME_BYTES} bytes"
        )
    return one_line(text)
