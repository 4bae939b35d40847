"""Tokenizers of words, for models of 64 tokens. Imports nothing of ours: `test_host_behaviour.py` runs without it."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

V = 64


def tokenizer(num_words: int = V) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({"abcdef" if i == 2 else f"w{i}": i for i in range(num_words)}, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w0")


def word_tokenizer():
    vocabulary = {"abcdef" if i == 2 else f"w{i}": i for i in range(V)}  # the host probes with that word
    backend = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w0")
