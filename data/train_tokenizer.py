"""Train the small byte-pair vocabulary that is shipped as nano_aimv2/data/toy.tiktoken.

Byte-pair encoding starts with the 256 single bytes as tokens. It then repeats one step: the most
frequent pair of neighbouring tokens becomes a new token. Here it learns from toy captions and some
plain English (the language reference that comes with Python), or from your own text:

    python data/train_tokenizer.py                     # makes nano_aimv2/data/toy.tiktoken again
    python data/train_tokenizer.py --out=my.tiktoken --size=4096 --text=captions.txt
    python train.py --tokenizer=my.tiktoken --vocab_size=4160     # above --size: the end token
"""

import base64
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that the script finds the package
from data.scenes import alt_text, dense_caption, draw_objects  # noqa: E402
from nano_aimv2.data.tokenizer import PATTERN  # noqa: E402
from nano_aimv2.files import write_text  # noqa: E402
from nano_aimv2.flags import check_at_least, read_flags, run_command  # noqa: E402


@dataclass
class Options:
    out: str = ""  # rank file to write; empty: the shipped nano_aimv2/data/toy.tiktoken
    size: int = 767  # tokens, not counting the end token
    text: str = ""  # text file to learn from; empty: toy captions and plain English

    def __post_init__(self):
        check_at_least(self, size=256)
        if not self.out and (self.text or self.size != Options.size):
            raise ValueError("no --out: a vocabulary of another --size or --text must not replace "
                             "the shipped one; name a file for it, --out=my.tiktoken")


def train_bpe(text, size):
    """Learn `size` tokens from a text: {bytes: rank}, the 256 single bytes first.

    Pairs are counted over the distinct words (a text repeats its words), and after a merge only in
    the words that it changed. Of equally frequent pairs, the last in byte order is merged.

    Raises: ValueError if the text has too few distinct pairs.
    """
    words = Counter(word.encode() for word in regex.findall(PATTERN, text))
    pieces = [[bytes([b]) for b in word] for word in words]
    counts = list(words.values())
    pairs, places = Counter(), defaultdict(set)

    def note(i, sign):
        for pair in zip(pieces[i], pieces[i][1:], strict=False):
            pairs[pair] += sign * counts[i]
            places[pair].add(i)

    for i in range(len(pieces)):
        note(i, +1)
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size:
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] <= 0:
            raise ValueError(f"size={size} tokens, but the text is only enough for {len(ranks)}: "
                             "give more text, or a smaller --size")
        ranks[best[0] + best[1]] = len(ranks)
        for i in places.pop(best):
            note(i, -1)
            pieces[i] = merge(pieces[i], best)
            note(i, +1)
        del pairs[best]
    return ranks


def merge(piece, pair):
    """Replace each occurrence of `pair` in a list of tokens by one token."""
    out, k = [], 0
    while k < len(piece):
        if tuple(piece[k : k + 2]) == pair:
            out.append(pair[0] + pair[1])
            k += 2
        else:
            out.append(piece[k])
            k += 1
    return out


def toy_corpus(scenes=4000):
    """Captions of toy scenes, and plain English."""
    from pydoc_data.topics import topics  # Python's language reference as text

    rng = np.random.default_rng(0)
    lines = []
    for _ in range(scenes):
        objects = draw_objects("train", rng)
        lines += [dense_caption(objects), alt_text(objects, rng)]
    return "\n".join([*lines, *topics.values()])


def write_ranks(ranks, path):
    """A tiktoken rank file: per line a token's bytes in base64, and its rank."""
    tokens = sorted(ranks, key=ranks.get)
    write_text(path, "".join(f"{base64.b64encode(t).decode()} {ranks[t]}\n" for t in tokens))


def main(argv):
    options = Options(**read_flags(argv, Options, doc=__doc__)[0])
    out = options.out or ROOT / "nano_aimv2/data/toy.tiktoken"
    text = Path(options.text).read_text(encoding="utf-8") if options.text else toy_corpus()
    write_ranks(train_bpe(text, options.size), out)
    print(f"written: {out}")


if __name__ == "__main__":
    run_command(main)
