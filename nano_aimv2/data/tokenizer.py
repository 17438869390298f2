"""Tokenizer: text to ids and back, by tiktoken.

Three sources: the small vocabulary shipped as `toy.tiktoken` in this folder, a rank file of your
own, or any encoding that tiktoken knows (`gpt2`, `cl100k_base`, ...; downloaded at first use).
Byte-level, so any text round-trips. One special id, the end token EOS, closes every caption and
is trained. Padding has no token: padded positions are left out of the loss. BOS is a learned
vector of the decoder, not an id.

Pipeline: caption -> **ids, EOS** -> decoder. Lesson: 07.
"""

import base64
import binascii
import contextlib
from pathlib import Path

import numpy as np
import tiktoken

EOS = "<|endoftext|>"
# GPT-2's rule for where words end; merges never cross it. A word keeps the space before it.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
MAX_CHARS_PER_TOKEN = 128  # no known encoding has longer tokens: the text beyond can be cut unseen


class Tokenizer:
    """`Tokenizer("toy.tiktoken")`, `Tokenizer("gpt2")`: encode, decode, eos, vocab_size.

    Raises: ValueError if the source is neither a readable rank file nor an available encoding.
    """

    def __init__(self, source):
        self.source = str(source)
        path = find_file(self.source)
        self.encoding = load_named(self.source) if path is None else load_ranks(path)
        self.eos = self.encoding.eot_token
        self.vocab_size = self.encoding.n_vocab

    def encode(self, text, max_tokens):
        """Ids of a caption with its EOS, cut at `max_tokens`: a caption that is cut has no EOS.

        Text that looks like a special token is plain text. Raises ValueError on an empty caption.
        """
        text = one_blank_apart(text[: MAX_CHARS_PER_TOKEN * max_tokens])
        if not text:
            raise ValueError("empty caption: a caption needs at least one character that is not a "
                             "space")
        return [*self.encoding.encode_ordinary(text), self.eos][:max_tokens]

    def encode_prompt(self, text):
        """Ids of the beginning of a caption, without EOS."""
        return self.encoding.encode_ordinary(one_blank_apart(text))

    def decode(self, ids):
        """Text of ids up to the first EOS.

        Ids that stand for nothing are skipped; broken UTF-8 becomes U+FFFD.
        """
        ids = list(ids)
        if self.eos in ids:
            ids = ids[: ids.index(self.eos)]
        parts = []
        for i in ids:
            with contextlib.suppress(KeyError):  # beyond the vocabulary, or a number left free
                parts.append(self.encoding.decode_single_token_bytes(i))
        return b"".join(parts).decode("utf-8", "replace")

    def save(self, folder):
        """Copy a rank file into `folder`, so that the run needs nothing else; return its path."""
        path = find_file(self.source)
        if path is None:
            return self.source
        target = Path(folder) / "tokenizer.tiktoken"
        if not (target.exists() and target.samefile(path)):
            target.write_bytes(path.read_bytes())
        return str(target)


def one_blank_apart(text):
    """Words with one blank between and none around them, as every caption is encoded."""
    return " ".join(text.split())


def tokenizer_of(config):
    """The tokenizer that a config names. Raises ValueError if vocab_size is too small for it."""
    tokenizer = Tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"tokenizer {config.tokenizer} has {tokenizer.vocab_size} tokens, "
                         f"vocab_size={config.vocab_size}: use "
                         f"--vocab_size={-(-tokenizer.vocab_size // 64) * 64}")
    return tokenizer


def find_file(source):
    """The rank file, relative to the current folder or to this one, or None."""
    for path in (Path(source), Path(__file__).parent / source):
        if path.is_file():
            return path
    return None


def load_ranks(path):
    """A rank file (per line a token in base64, and its rank); EOS gets the next free id."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number}: {line[:40]!r} is not a rank line; each line "
                             "of a tiktoken rank file is 'BASE64-OF-TOKEN RANK'") from None
    if len(set(ranks.values())) != len(ranks) or any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError(f"{path} has {len(ranks)} tokens; a rank file needs all 256 single bytes "
                         "and no rank twice")
    eos = max(ranks.values()) + 1
    return tiktoken.Encoding(path.stem, pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={EOS: eos})


def load_named(name):
    """One of tiktoken's own encodings, downloaded at first use."""
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"tokenizer {name!r} is neither a file nor one of "
                         f"{', '.join(tiktoken.list_encoding_names())}; toy.tiktoken is shipped")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # what requests raises without a network
        raise ValueError(
            f"tokenizer {name!r} must be downloaded and could not be ({type(error).__name__}). "
            "Where there is a network, run `TIKTOKEN_CACHE_DIR=DIR python -c \"import tiktoken; "
            f"tiktoken.get_encoding('{name}')\"`, copy DIR here and set TIKTOKEN_CACHE_DIR to it; "
            "or use --tokenizer=toy.tiktoken") from error


def pad_tokens(token_lists, multiple=8):
    """Lists of ids -> (tokens i64[B, T], zeros at the end; num_tokens i64[B]); 8 divides T."""
    num_tokens = np.array([len(ids) for ids in token_lists], dtype=np.int64)
    length = -(-int(num_tokens.max()) // multiple) * multiple
    tokens = np.zeros((len(token_lists), length), dtype=np.int64)
    for row, ids in zip(tokens, token_lists, strict=True):
        row[: len(ids)] = ids
    return tokens, num_tokens
