"""Token ids against those of CrossEncoder."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from ettin.artifacts.errors import DamagedArtifact, InputError, UsageError
from ettin.bench.workloads import read_beir
from ettin.export.proof_pairs import natural_pairs
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.runtimes import tokenizer as tokenizer_module
from ettin.runtimes.tokenizer import PairTokenizer, kept_tokens

ODD_TEXTS = [
    "", " ", "\n\t ", "a", "é", "e\u0301", "日本語の文書", "🙂🙃👩‍👩‍👧", "\u200b\u00ad\ufeff",
    "[CLS] [SEP] [MASK] [PAD]", "x" * 3000, "a\x00b", "مرحبا بالعالم", "def f(x):\n\treturn x ** 2  # ½",
    "ﬁ Å ①", "word " * 700,
]  # fmt: skip


def reference_ids(tokenizer: Any, pairs: list[tuple[str, str]], max_length: int) -> list[list[int]]:
    """As CrossEncoder calls its tokenizer: pairs, truncation 'longest_first'."""
    encoded = tokenizer([list(pair) for pair in pairs], truncation="longest_first", max_length=max_length)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def assert_equal_ids(folder: Path, tokenizer: Any, pairs: list[tuple[str, str]], max_length: int) -> None:
    found = PairTokenizer(folder / "tokenizer.json").pairs(pairs, max_length)
    expected = reference_ids(tokenizer, pairs, max_length)
    for pair, ours, theirs in zip(pairs, found, expected, strict=True):
        assert ours.tolist() == theirs, (pair, max_length)


@pytest.mark.parametrize("max_length", [3, 4, 5, 16, 17, 128, 512, 7999])
def test_equal_on_own_texts_and_odd_ones(demo_gold: Any, max_length: int) -> None:
    pairs = [(pair.query, pair.document) for pair in natural_pairs()]
    pairs += [(first, second) for first in ODD_TEXTS for second in ODD_TEXTS]
    # The library keeps what it cuts off, piece by piece and pair by pair: long texts at a few tokens take gigabytes.
    pairs = [pair for pair in pairs if max_length >= 64 or len(pair[0]) + len(pair[1]) < 50 * max_length]
    assert_equal_ids(DEMO_FOLDER, demo_gold.tokenizer, pairs, max_length)


def test_equal_to_what_the_cross_encoder_feeds_its_model(demo_gold: Any) -> None:
    pairs = [(first, second) for first in ODD_TEXTS for second in ODD_TEXTS]
    found = PairTokenizer(DEMO_FOLDER / "tokenizer.json").pairs(pairs, demo_gold.max_seq_length)
    for pair, ours in zip(pairs, found, strict=True):
        assert demo_gold.preprocess([list(pair)])["input_ids"][0].tolist() == ours.tolist(), pair


def test_equal_on_ten_thousand_real_pairs(shared: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    folder = shared("checkpoints/17m-lexical")
    generator = random.Random(0)
    pairs = []
    for name in ("squad-dev-v1.1", "scifact", "cranfield"):
        data = read_beir(shared(f"retrieval/{name}"))
        queries, documents = list(data.queries.values()), list(data.documents.values())
        pairs += [(generator.choice(queries), generator.choice(documents)) for _ in range(3400)]
    assert len(pairs) >= 10_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert_equal_ids(folder, tokenizer, pairs, 512)
    assert_equal_ids(folder, tokenizer, pairs[:1000], 64)


def test_over_long_real_pairs(shared: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    folder = shared("checkpoints/17m-lexical")
    data = read_beir(shared("retrieval/squad-dev-v1.1"))
    texts = list(data.documents.values())
    long = [" ".join(texts[at : at + 80]) for at in range(0, 400, 40)]
    pairs = [("which war?", each) for each in long] + [(each, "short") for each in long]
    pairs += itertools.pairwise(long)
    assert_equal_ids(folder, AutoTokenizer.from_pretrained(folder), pairs, 7999)


SCRIPTS = {
    "words": "The planet, known as 'the Red Planet', isn't far:  it's 3.5 AU\n\naway \t (or so). ",
    "spaces": "a  b   c \n \n d\r\n e \u00a0 f\u2003 g \x1c h \u180e i\u0085 j",
    "chinese": "火星是红色的行星。它有两颗卫星，火卫一和火卫二！真的吗？",
    "japanese": "これは「文書」です。カ\u3099ス、か\u3099、（はい）：そうです。",
    "korean": "화성은 붉은 행성이다。각각의 문장、단어：",
    "accents": "e\u0301te\u0301 \u0301a a\u0323\u0307 \u1100\u1161\u11a8 x ",
    "tokens": "[MASK]  [MASK] x[SEP] y |||IP_ADDRESS||| [unused3] <|endoftext|> [CLS].",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_pieces_of_a_long_text_have_the_ids_of_the_text(
    demo_gold: Any, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut every few characters, so that every kind of place is met."""
    monkeypatch.setattr(tokenizer_module, "_LEAST_PIECE_CHARACTERS", 1)
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_PER_TOKEN", 0)
    generator = random.Random(script)
    parts = SCRIPTS[script].split(" ")
    texts = [SCRIPTS[script] * 20, *(" ".join(generator.choices(parts, k=600)) for _ in range(4))]
    whole = tokenizers.Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    whole.no_truncation()
    ours = PairTokenizer(DEMO_FOLDER / "tokenizer.json")
    for text in texts:
        ids = ours.texts([text], 10**9)[text]
        assert ids.tolist() == whole.encode(text, add_special_tokens=False).ids
    # Short ones, for the library keeps what it cuts off.
    pairs = [(query, text[:700]) for query in ("which planet?", texts[0][:700], texts[1][:600]) for text in texts]
    assert_equal_ids(DEMO_FOLDER, demo_gold.tokenizer, pairs, 128)


def test_which_of_two_long_texts_keeps_the_odd_token(demo_gold: Any) -> None:
    """Both are cut before they are counted, so the longer one must still be known."""
    long, longer = "word " * 900, "word " * 901
    assert_equal_ids(DEMO_FOLDER, demo_gold.tokenizer, [(long, longer), (longer, long), (long, long)], 128)


def test_a_text_is_tokenised_no_further_than_needed() -> None:
    """Finding 9."""
    tokenizer = PairTokenizer(DEMO_FOLDER / "tokenizer.json")
    text = "some words. " * 3_000_000
    assert len(tokenizer.texts([text], 512)[text]) < 5000
    (ids,), is_truncated = tokenizer.encoded([("q", text)], 512)[0]
    assert len(ids) == 512 and is_truncated
    assert not tokenizer.encoded([("q", "some words")], 512)[0].is_truncated
    with pytest.raises(InputError, match=r"3000016 characters without a space, limit 1000000. Shorten it"):
        tokenizer.pairs([("q", "x" * 3_004_088)], 512)


def test_a_tokenizer_that_may_not_be_cut_is_not(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.add_tokens([tokenizers.AddedToken("New York")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "to New York " * 3000
    cut = PairTokenizer(tmp_path / "tokenizer.json").texts([text], 16)[text]
    assert cut.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("query", "document", "kept"),
    # Measured with tokenizers 0.23.3 at max_length 512, of which 509 are free.
    [
        (600, 600, (254, 255)), (300, 900, (254, 255)), (900, 300, (255, 254)),
        (100, 900, (100, 409)), (900, 100, (409, 100)), (200, 300, (200, 300)),
    ],
)  # fmt: skip
def test_longest_first_rule(query: int, document: int, kept: tuple[int, int]) -> None:
    assert kept_tokens(query, document, 509) == kept


def test_longest_first_rule_is_the_librarys() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    tokenizer.no_padding()
    generator = random.Random(1)
    for _ in range(300):
        query, document = generator.randrange(40), generator.randrange(40)
        room = generator.randrange(45)
        tokenizer.enable_truncation(room + 3, strategy="longest_first")
        encoded = tokenizer.encode(" a" * query, " b" * document)
        expected = (encoded.sequence_ids.count(0), encoded.sequence_ids.count(1))
        assert kept_tokens(query, document, room) == expected, (query, document, room)


def test_ids_are_int32_and_texts_tokenised_once() -> None:
    tokenizer = PairTokenizer(DEMO_FOLDER / "tokenizer.json")
    assert set(tokenizer.texts(["a", "b", "a"])) == {"a", "b"}
    assert tokenizer.pairs([("a", "b")], 16)[0].dtype == np.int32


def test_lone_surrogate_is_named() -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        PairTokenizer(DEMO_FOLDER / "tokenizer.json").pairs([("fine", "bad \ud800")], 16)


def test_no_room_is_refused() -> None:
    with pytest.raises(UsageError, match="expected at least 3"):
        PairTokenizer(DEMO_FOLDER / "tokenizer.json").pairs([("a", "b")], 2)


def test_another_template_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B [SEP]", special_tokens=[("[CLS]", 8188), ("[SEP]", 8189)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DamagedArtifact, match="joins pairs in another way"):
        PairTokenizer(tmp_path / "tokenizer.json")


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DamagedArtifact, match="not a tokenizer"):
        PairTokenizer(tmp_path / "tokenizer.json")
