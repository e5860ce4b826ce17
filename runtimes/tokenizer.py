"""Pairs of texts → token ids, equal to those of sentence-transformers' CrossEncoder."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tokenizers

from ettin.artifacts.errors import DamagedArtifact, InputError, UsageError
from ettin.runtimes.batch import Ids
from ettin.runtimes.long_documents import LongDocuments

if TYPE_CHECKING:  # needs pydantic
    from ettin.artifacts.opened import OpenArtifact

SPECIAL_TOKENS = 3  # [CLS] query [SEP] document [SEP]

# A text is tokenised in parts of this many characters for each token that is wanted, until there are enough tokens.
CHARACTERS_PER_TOKEN = 8
_LEAST_PIECE_CHARACTERS = 2048
# Maximum length of a part that can't be cut. It bounds the memory and the time that one text can take.
_MOST_PIECE_CHARACTERS = 1_000_000
_PART_TOKENS = 8192  # at most this many are wanted of a part, when a whole text is tokenised
# Where a text may be cut so that the ids of the parts are those of the text: before a space or line break that follows
# something else, and between punctuation and a letter of a script that is written without spaces. The pre-tokenizer
# (GPT-2's regular expression) begins a new word there, and NFC joins nothing across it. U+180E is a space in some
# versions of Unicode.
_CUT = re.compile(
    "(?<=[^\\s\u180e])(?=[ \n])|(?<=[、。，！？；：])(?=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3])"
)

_TRUNCATE = LongDocuments()


def kept_tokens(query: int, document: int, room: int) -> tuple[int, int]:
    """How many tokens of each side `longest_first` truncation keeps, of `room` tokens for both.

    Source: `truncate_encodings` of the tokenizers library. A side shorter than half the room is kept whole, else both
    get half, the longer one the odd token.
    """
    if query + document <= room:
        return query, document
    short = min(query, document)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (long, short) if query > document else (short, long)


class Encoded(NamedTuple):
    """A tokenised pair."""

    chunks: tuple[Ids, ...]  # with special tokens; one, unless a long document was cut into several
    is_truncated: bool  # some of the pair's tokens are in none of them


def artifact_tokenizer(artifact: "OpenArtifact") -> "PairTokenizer":
    """The tokenizer of an artifact; raises `DamagedArtifact`, also if it has token ids that the model lacks."""
    from ettin.artifacts.opened import TOKENIZER_NAME

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
        content: the checked content of the file; None: read it.

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
        self._may_cut = _may_cut(self._tokenizer)
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

    def texts(self, texts: Sequence[str], enough: int | None = None) -> dict[str, Ids]:
        """Ids of each distinct text, without special tokens. A long text is tokenised in parts, no further than needed.

        Args:
            texts: the texts.
            enough: number of ids that are needed of each text; None: all.

        Returns:
            By text, int32 [its tokens, or more than `enough` of them].

        Raises:
            InputError: a text that is not valid Unicode (a lone surrogate), or that has over a million characters
                without a space.
        """
        parts: dict[str, list[Ids]] = {text: [] for text in texts}
        starts = dict.fromkeys(parts, 0)
        left = list(parts)
        while left:
            ends = [self._piece_end(text, starts[text], enough) for text in left]
            pieces = [text[starts[text] : end] for text, end in zip(left, ends, strict=True)]
            for text, end, ids in zip(left, ends, self._encoded_pieces(pieces), strict=True):
                parts[text].append(ids)
                starts[text] = end
            left = [
                text
                for text in left
                if starts[text] < len(text) and (enough is None or sum(map(len, parts[text])) <= enough)
            ]
        return {text: ids[0] if len(ids) == 1 else np.concatenate(ids) for text, ids in parts.items()}

    def _piece_end(self, text: str, start: int, enough: int | None) -> int:
        if enough is None or not self._may_cut:
            return len(text)
        size = max(_LEAST_PIECE_CHARACTERS, CHARACTERS_PER_TOKEN * min(enough, _PART_TOKENS))
        if len(text) - start <= size:
            return len(text)
        cut = _CUT.search(text, start + size)
        end = cut.start() if cut else len(text)
        if end - start - size > _MOST_PIECE_CHARACTERS:
            raise InputError(
                f"text {text[start : start + 40]!r} … has {end - start - size} characters without a space, limit "
                f"{_MOST_PIECE_CHARACTERS}. Shorten it"
            )
        return end

    def _encoded_pieces(self, pieces: list[str]) -> list[Ids]:
        try:
            encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        except (UnicodeError, TypeError):
            for piece in pieces:
                try:
                    piece.encode()
                except UnicodeEncodeError as error:
                    raise InputError(f"text {piece[:40]!r} … is not valid Unicode ({error.reason})") from None
            raise
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def pairs(self, pairs: Sequence[tuple[str, str]], max_length: int) -> list[Ids]:
        """Ids of pairs, special tokens included, int32 [at most max_length] each; see `encoded`."""
        return [chunks[0] for chunks, _ in self.encoded(pairs, max_length)]

    def encoded(
        self, pairs: Sequence[tuple[str, str]], max_length: int, long_documents: LongDocuments = _TRUNCATE
    ) -> list[Encoded]:
        """Tokenises pairs, truncated as CrossEncoder does it (`longest_first`), or in chunks.

        Args:
            pairs: (query, document).
            max_length: maximum number of tokens of a pair or chunk, special tokens included.
            long_documents: what happens to longer ones. In chunks, as much of the query is kept as truncation keeps.

        Raises:
            UsageError: max_length leaves no room for the special tokens.
            InputError: a text that can't be tokenised, see `texts`.
        """
        room = max_length - SPECIAL_TOKENS
        if room < 0:
            raise UsageError(f"max_length is {max_length}, expected at least {SPECIAL_TOKENS} (the special tokens)")
        limit = long_documents.max_tokens_per_doc or sys.maxsize
        queries = self.texts([query for query, _ in pairs], room)
        documents = self.texts(
            [document for _, document in pairs], min(limit, sys.maxsize if long_documents.has_chunks else room)
        )
        encoded = []
        for query, document in pairs:
            first, second = queries[query], documents[document][:limit]
            counts = len(first), len(second)
            if min(counts) > room and room % 2:
                counts = self._count(query), min(self._count(document), limit)  # the longer one keeps the odd token
            keep_first, keep_second = kept_tokens(*counts, room)
            starts = long_documents.starts(len(second), keep_second)
            chunks = [
                (self._cls, first[:keep_first], self._sep, second[start : start + keep_second], self._sep)
                for start in starts
            ]
            is_truncated = keep_first < counts[0] or starts[-1] + keep_second < len(documents[document])
            encoded.append(Encoded(tuple(np.concatenate(parts, dtype=np.int32) for parts in chunks), is_truncated))
        return encoded

    def _count(self, text: str) -> int:
        """Number of tokens of a whole text, which is tokenised in parts."""
        start = count = 0
        while start < len(text):
            end = self._piece_end(text, start, _PART_TOKENS)
            count += len(self._encoded_pieces([text[start:end]])[0])
            start = end
        return count


def _may_cut(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether `_CUT` is right for this tokenizer: it must be that of ModernBERT and Ettin in all that matters."""
    normalizer, splitter = tokenizer.normalizer, tokenizer.pre_tokenizer
    added = tokenizer.get_added_tokens_decoder().values()
    return (
        (normalizer is None or isinstance(normalizer, tokenizers.normalizers.NFC))
        and isinstance(splitter, tokenizers.pre_tokenizers.ByteLevel)
        and splitter.use_regex
        and not splitter.add_prefix_space
        and not any(token.rstrip or token.single_word or _CUT.search(token.content) for token in added)
    )
