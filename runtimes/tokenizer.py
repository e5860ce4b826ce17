"""Pairs of texts → token ids, equal to those of sentence-transformers' CrossEncoder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from ettin.artifacts.errors import DamagedArtifact, InputError, UsageError
from ettin.artifacts.opened import TOKENIZER_NAME, OpenArtifact
from ettin.runtimes.batch import Ids

SPECIAL_TOKENS = 3  # [CLS] query [SEP] document [SEP]


def kept_tokens(query: int, document: int, room: int) -> tuple[int, int]:
    """How many tokens of each side `longest_first` truncation keeps.

    Source: `truncate_encodings` of the tokenizers library (its rule is not "cut the longer by one until it
    fits": a side shorter than half the room is kept whole, else both get half, the longer one the odd token).

    Args:
        query: tokens of the query.
        document: tokens of the document.
        room: tokens that both may have together.
    """
    if query + document <= room:
        return query, document
    short = min(query, document)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (long, short) if query > document else (short, long)


def artifact_tokenizer(artifact: OpenArtifact) -> "PairTokenizer":
    """The tokenizer of an artifact.

    Raises:
        DamagedArtifact: it is damaged, or its token ids are not the model's.
    """
    manifest = artifact.manifest
    tokenizer = PairTokenizer(artifact.path / TOKENIZER_NAME, artifact.read(TOKENIZER_NAME))
    rows, pad = manifest.source.shape.get("vocab_size"), manifest.tokenizer.pad_token_id
    if not isinstance(rows, int) or max(tokenizer.vocab_size - 1, pad) >= rows:
        raise DamagedArtifact(
            f"{artifact.path}: token ids up to {max(tokenizer.vocab_size - 1, pad)}, but the model has embeddings for "
            f"{rows}. Export again: {manifest.command}"
        )
    return tokenizer


class PairTokenizer:
    """Tokenises queries and documents separately and joins their ids, so a query is tokenised once.

    Args:
        path: a `tokenizer.json`.
        content: what was read from it and checked; None: it is read now.

    Raises:
        DamagedArtifact: not a tokenizer, or one that joins pairs in another way than [CLS] q [SEP] d [SEP].
    """

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes() if content is None else content)
        except Exception as error:  # the library raises bare Exception
            raise DamagedArtifact(f"{path}: not a tokenizer ({error}). Export again.") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        sample = ("which planet", "a red planet")
        query, document = (self._tokenizer.encode(text, add_special_tokens=False).ids for text in sample)
        joined = self._tokenizer.encode(*sample).ids
        self._cls, self._sep = joined[:1], joined[-1:]
        if joined != [*self._cls, *query, *self._sep, *document, *self._sep]:
            raise DamagedArtifact(f"{path}: joins pairs in another way than [CLS] query [SEP] document [SEP]")

    @property
    def vocab_size(self) -> int:
        """Highest token id + 1."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def texts(self, texts: Sequence[str]) -> dict[str, Ids]:
        """Ids of each distinct text, without special tokens, int32 [its tokens].

        Raises:
            InputError: a text that is not valid Unicode (a lone surrogate).
        """
        distinct = list(dict.fromkeys(texts))
        try:
            encodings = self._tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
        except (UnicodeError, TypeError):
            for text in distinct:
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise InputError(f"text {text[:40]!r} … is not valid Unicode ({error.reason})") from None
            raise
        return {text: np.array(each.ids, np.int32) for text, each in zip(distinct, encodings, strict=True)}

    def pairs(self, pairs: Sequence[tuple[str, str]], max_length: int) -> list[Ids]:
        """Ids of pairs, special tokens included, int32 [at most max_length] each.

        Raises:
            UsageError: max_length leaves no room for the special tokens.
            InputError: a text that is not valid Unicode.
        """
        room = max_length - SPECIAL_TOKENS
        if room < 0:
            raise UsageError(f"max_length is {max_length}, expected at least {SPECIAL_TOKENS} (the special tokens)")
        ids = self.texts([text for pair in pairs for text in pair])
        joined = []
        for query, document in pairs:
            first, second = ids[query], ids[document]
            keep_first, keep_second = kept_tokens(len(first), len(second), room)
            parts = (self._cls, first[:keep_first], self._sep, second[:keep_second], self._sep)
            joined.append(np.concatenate(parts, dtype=np.int32))
        return joined
