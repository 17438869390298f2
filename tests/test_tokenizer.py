"""Text to token ids and back, with the shipped vocabulary and with others."""

import base64

import pytest
import requests
import tiktoken

from nano_aimv2.data.tokenizer import Tokenizer, find_file, pad_tokens

TOY = "toy.tiktoken"


@pytest.mark.parametrize("text", [
    "top left a large red star", "naïve café 🙂🏳️‍🌈", "日本語のテキスト",
    "control\x00\x07characters", "<|endoftext|> is plain text",
    "IMG_0042.jpg"])
def test_any_text_round_trips_and_ends(text):
    tokenizer = Tokenizer(TOY)
    ids = tokenizer.encode(text, 500)
    assert ids[-1] == tokenizer.eos and ids.count(tokenizer.eos) == 1
    assert tokenizer.decode(ids) == text


def test_toy_words_are_single_tokens():
    caption = "top left a large red star, bottom right a small blue ring"
    assert len(Tokenizer(TOY).encode(caption, 99)) == 14


def test_a_long_caption_is_cut_and_has_no_end():
    tokenizer = Tokenizer(TOY)
    ids = tokenizer.encode("word " * 10_000, 32)
    assert len(ids) == 32 and tokenizer.eos not in ids
    assert len(tokenizer.encode("x" * 1_000_000, 32)) == 32


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_an_empty_caption_is_refused(text):
    with pytest.raises(ValueError, match="empty caption"):
        Tokenizer(TOY).encode(text, 32)


def test_ids_of_the_padded_vocabulary_are_not_decoded():
    tokenizer = Tokenizer(TOY)
    assert tokenizer.decode([tokenizer.encode("red", 5)[0], 9999, tokenizer.eos, 65]) == "red"


def test_an_encoding_that_must_be_downloaded_and_cannot_be_says_how(monkeypatch):
    def no_network(*_args, **_kwargs):
        raise requests.exceptions.ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(ValueError, match="'gpt2' must be downloaded.*TIKTOKEN_CACHE_DIR"):
        Tokenizer("gpt2")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="neither a file nor one of .*gpt2"):
        Tokenizer("gpt3")


@pytest.mark.parametrize("content, message", [
    ("not a rank file\n", "line 1"), ("YQ== 0\n", "256 single bytes")])
def test_a_damaged_rank_file_is_named(tmp_path, content, message):
    path = tmp_path / "broken.tiktoken"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"broken.tiktoken.*{message}"):
        Tokenizer(path)


def test_padding_rounds_up_to_eight():
    tokens, num_tokens = pad_tokens([[5, 6, 7], list(range(9))])
    assert tokens.shape == (2, 16) and num_tokens.tolist() == [3, 9]
    assert tokens[0].tolist() == [5, 6, 7] + [0] * 13


def test_the_trainer_learns_the_frequent_words_and_refuses_too_little_text(tmp_path):
    from data.train_tokenizer import train_bpe, write_ranks

    ranks = train_bpe("red star blue star red ring " * 50, 266)
    assert len(ranks) == 266 and b" star" in ranks
    write_ranks(ranks, tmp_path / "own.tiktoken")
    tokenizer = Tokenizer(tmp_path / "own.tiktoken")
    assert tokenizer.vocab_size == 267
    assert tokenizer.decode(tokenizer.encode("a star ☆", 99)) == "a star ☆"
    with pytest.raises(ValueError, match="only enough for 257: give more text"):
        train_bpe("ab", 300)


@pytest.mark.parametrize("argv", [["--size=300"], ["--text=captions.txt"]])
def test_another_vocabulary_does_not_replace_the_shipped_one(argv):
    from data.train_tokenizer import main

    with pytest.raises(ValueError, match="must not replace the shipped one"):
        main(argv)


def test_the_shipped_vocabulary_is_what_its_script_makes():
    from data.train_tokenizer import toy_corpus, train_bpe

    learned = train_bpe(toy_corpus(), 767)
    shipped = find_file(TOY).read_text().splitlines()
    assert len(learned) == len(shipped)
    # The plain English comes with Python and differs a little between its versions
    same = {base64.b64decode(line.split()[0]) for line in shipped} & set(learned)
    assert len(same) > 700, len(same)


def test_ids_that_a_rank_file_leaves_free_are_skipped(tmp_path):
    """cl100k_base has 16 of them."""
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    (tmp_path / "gap.tiktoken").write_text("\n".join([*lines, "YWI= 300"]) + "\n")
    tokenizer = Tokenizer(tmp_path / "gap.tiktoken")
    assert tokenizer.vocab_size == 302 and tokenizer.eos == 301
    assert tokenizer.decode([65, 270, 300, 299, 66, 301, 67]) == "AabB"
    assert tokenizer.decode([0xE2, 280, 65]) == "\ufffdA"


@pytest.mark.parametrize("prompt", ["top left ", "  top   left", "top left\n", "\ttop\u00a0left",
                                    "top left"])
def test_a_prompt_is_encoded_as_the_beginning_of_a_caption(prompt):
    tokenizer = Tokenizer(TOY)
    ids = tokenizer.encode_prompt(prompt)
    assert ids == tokenizer.encode("top left a large red star", 30)[: len(ids)] and len(ids) == 2
