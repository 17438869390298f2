"""Train the small byte-pair vocabulary that is shipped as `data/toy.tiktoken`.

Byte-pair encoding starts from the 256 bytes and gives the most frequent neighbouring pair a token of its own, again and
again. Here over the toy captions and some plain English (the language reference that comes with Python), or your texts:

    python data/train_tokenizer.py --out=data/toy.tiktoken
    python data/train_tokenizer.py --out=my.tiktoken --size=4096 --text=captions.txt     # then --tokenizer=my.tiktoken
"""

import argparse
import base64
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, this file sees the package beside its folder
from data.scenes import alt_text, dense_caption, draw_objects  # noqa: E402
from nano_aimv2.tokenizer import PATTERN  # noqa: E402


def train_bpe(text, size):
    """Learn `size` tokens from a text: -> {bytes: rank}, the 256 single bytes first.

    Pairs are counted over the distinct words (a text repeats its words), and after a merge only in the words it touched.
    Ties go to the pair that comes last in byte order. Raises ValueError if the text has too few distinct pairs.
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
            raise ValueError(f"the text gives {len(ranks)} tokens, {size} asked for: bring more text or ask for fewer")
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
    """A tiktoken rank file: a line a token, base64 of its bytes and its rank."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
    Path(path).write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a byte-pair vocabulary.", allow_abbrev=False)
    parser.add_argument("--out", default="data/toy.tiktoken", help="rank file to write")
    parser.add_argument("--size", type=int, default=767, help="tokens, the end token not counted")
    parser.add_argument("--text", help="text file to learn from; without it, toy captions and plain English")
    args = parser.parse_args()
    text = Path(args.text).read_text(encoding="utf-8") if args.text else toy_corpus()
    write_ranks(train_bpe(text, args.size), args.out)
    print(f"written: {args.out}")
