"""Tokenizer whose tokens are bytes, made without a download."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS = 256


def bytes_tokenizer(*, adds_bos=False):
    """Make a tokenizer with one token per byte, so that every count is known; id 256 is BOS."""
    alphabet = {character: index for index, character in enumerate(_byte_alphabet())}
    inner = Tokenizer(models.BPE(vocab={**alphabet, "<s>": BOS}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def _byte_alphabet():
    """Return the characters of the bytes in a byte-level vocabulary, in byte order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    characters = {byte: chr(byte) for byte in shown}
    characters |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return [characters[byte] for byte in range(256)]
