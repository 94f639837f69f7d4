"""Pieces of a text give the tokens of the whole text."""

from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sparse_expansion.data.tokenization import encoder

TEXT = "\n\n".join(topics[name] for name in sorted(topics))[:120_000]
OTHERS = "naïve café — 東京 \N{GRINNING FACE}\N{GRINNING FACE} <s> </s>  \t\n\n   tabs\r\n"


def llama_style(text):
    """Words begin with a mark, a space is put before the text, and <s> before and </s> after it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Replace("▁", " ")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, show_progress=False, max_token_length=12
    )
    # Lines, so that no token reaches over the end of one.
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    around = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_piece(text):
    """Lower case, and words apart."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=900, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=["byte level", "llama", "word piece"])
def made(request, tokenizer):
    if request.param == "byte level":
        return tokenizer
    return (llama_style if request.param == "llama" else word_piece)(TEXT[:20_000])


class Counting:
    """A tokenizer that keeps the lengths of what it is given."""

    is_fast = True

    def __init__(self, tokenizer):
        self.tokenizer, self.lengths = tokenizer, []

    def __call__(self, text, **options):
        self.lengths.append(len(text))
        return self.tokenizer(text, **options)


@pytest.mark.parametrize(("piece", "overlap"), [(4000, 400), (1001, 257)])
def test_pieces_give_the_tokens_of_the_whole(made, piece, overlap):
    text = TEXT[:40_000] + 30 * OTHERS + TEXT[40_000:60_000]
    counting = Counting(made)
    found = encoder(counting, piece=piece, overlap=overlap)(text)
    assert found.dtype == torch.int64
    assert found.tolist() == made(text)["input_ids"]
    assert max(counting.lengths) == piece and len(counting.lengths) > len(text) // piece


def test_what_is_around_a_text_is_there_once():
    made = llama_style(TEXT[:20_000])
    found = encoder(made, piece=500, overlap=100)(TEXT[:5000]).tolist()
    assert found[0] == made.convert_tokens_to_ids("<s>")
    assert found[-1] == made.convert_tokens_to_ids("</s>")
    assert found.count(found[0]) == found.count(found[-1]) == 1


def test_pieces_that_do_not_agree_go_through_whole():
    # One token as long as several overlaps: a word of more than 100 letters is unknown.
    made = word_piece(TEXT[:20_000])
    text = TEXT[:3000] + 2100 * "a" + TEXT[3000:6000]
    counting = Counting(made)
    found = encoder(counting, piece=1000, overlap=200)(text)
    assert found.tolist() == made(text)["input_ids"]
    assert counting.lengths[-1] == len(text)


def test_short_and_empty_texts(made):
    for text in ("", "a", TEXT[:1000], TEXT[:1001]):
        assert encoder(made, piece=1000, overlap=100)(text).tolist() == made(text)["input_ids"]


def test_no_more_is_looked_at_than_is_asked_for(made):
    wanted = made(TEXT)["input_ids"]
    counting = Counting(made)
    encode = encoder(counting, piece=2000, overlap=400)
    for most in (1, 100, 2000):
        counting.lengths.clear()
        assert encode(TEXT, most=most).tolist() == wanted[:most]
        # Some are at work already when there are enough.
        assert len(counting.lengths) < 20
    assert encode(TEXT, most=10**9).tolist() == wanted
    assert encode("", most=5).tolist() == made("")["input_ids"]


def test_a_tokenizer_that_comes_with_truncation_gives_all():
    made = word_piece(TEXT[:20_000])
    wanted = made(TEXT[:9000])["input_ids"]
    made.backend_tokenizer.enable_truncation(max_length=7)
    made.backend_tokenizer.enable_padding(length=9)
    assert encoder(made, piece=500, overlap=100)(TEXT[:9000]).tolist() == wanted
