"""Two CLIP tokenizers with a byte-level vocabulary of their own, learnt from captions: any text can be encoded, none is unknown."""

import json
from collections.abc import Sequence
from typing import Any, Final

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
_WORDS: Final = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""  # CLIP's own division of text


def build_tokenizers(captions: Sequence[str], vocabulary_size: int, max_tokens: int) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Learn byte-pair merges from the captions (BPE, arXiv 1508.07909) and return SDXL's two tokenizers.

    The first pads with the end token, the second with "!", as in SDXL. The vocabulary depends on the captions alone.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = vocabulary_size - 2
    merges = [pair for pair in _merges(captions, alphabet, vocabulary_size) if len(pair) == 2]
    # CLIP's order: bytes, bytes at a word's end, merges, the two special tokens last.
    words = list(dict.fromkeys([*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges)]))[:room]
    vocabulary = {word: number for number, word in enumerate([*words, START, END])}
    kept = [pair for pair in merges if all(part in vocabulary for part in (*pair, "".join(pair)))]
    kind: Any = CLIPTokenizer  # its annotations know files only
    first = kind(vocab=vocabulary, merges=kept, model_max_length=max_tokens)
    second = kind(vocab=vocabulary, merges=kept, model_max_length=max_tokens, pad_token="!")
    return first, second


def _merges(captions: Sequence[str], alphabet: list[str], vocabulary_size: int) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(sorted(captions), trainer)
    return [(pair[0], pair[1]) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
