"""Generate: captions by sampling words, pictures by predicting patches, both with KV caches.

*Captions*: the encoder sees the whole image, the decoder reads [image | BOS | prompt] once and then word after word.

*Completions*: given the first M patches, patch M is predicted, turned into pixels, and fed back through the encoder and
the decoder, and so on. M stays fixed, so a later patch is only ever seen by later queries: what the caches hold never
changes, in the encoder's causal region as in the decoder. A prediction is a normalised patch; the statistics head adds
its mean and deviation (model.py). Regression is deterministic: there is no temperature on pixels.

Lesson: 09.
"""

from dataclasses import dataclass

import torch

from nano_aimv2.layers import KVCache
from nano_aimv2.patchify import denormalize_patches, float_to_pixels, pixels_to_float


@dataclass
class Caption:
    text: str
    log_prob: float  # of the generated tokens under the model, EOS included, in nats
    ids: list


def make_caches(trunk, capacity):
    return [KVCache(capacity) for _ in trunk.blocks]


def by_size(grid):
    """Row numbers of the images of each patch count: a batch that is generated together has one length."""
    num_patches = grid.prod(dim=1)
    return [(int(n), (num_patches == n).nonzero()[:, 0]) for n in num_patches.unique()]


def choose(logits, temperature, top_k, top_p, generator):
    """The next token of each row of logits f[B, V]: the likeliest at temperature 0, else drawn -> i64[B]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:  # keep the likeliest tokens up to the one that reaches top_p
        values, order = logits.sort(descending=True)
        before = values.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(dim=-1)), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)


@torch.inference_mode()
def caption(model, patches, grid, tokenizer, prompt="", temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=None,
            cached=True):
    """Caption images.

    Args:
        model: AIMv2; patches: u8[B, A, P] raw pixels; grid: i64[B, 2] (rows, cols); tokenizer: the run's.
        prompt: text to continue; temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens; seed: of the draws.
        max_tokens: length at which to stop, at most the model's. cached: False recomputes everything for each word.
    Returns: [Caption] in the order of the images; the text begins with the prompt.
    Raises: ValueError if the prompt fills max_tokens, or a sampling setting is out of range.
    """
    limit = min(max_tokens or model.config.max_tokens, model.config.max_tokens)
    prompt_ids = tokenizer.encode_prompt(prompt)
    if len(prompt_ids) >= limit:
        raise ValueError(f"prompt {prompt!r} has {len(prompt_ids)} tokens; at most {limit - 1} leave room for a caption")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} and top_k={top_k} must be at least 0, top_p={top_p} in (0, 1]")
    generator = torch.Generator().manual_seed(seed)
    results = [None] * len(patches)
    for n, rows in by_size(grid):
        features = model.encoder(pixels_to_float(patches[rows, :n], model.config.pixel_mean, model.config.pixel_std), grid[rows])
        ids, log_probs = decode_words(model.decoder, features, prompt_ids, limit, tokenizer, cached,
                                      lambda logits: choose(logits, temperature, top_k, top_p, generator))
        for row, line, log_prob in zip(rows.tolist(), ids.tolist(), log_probs.tolist(), strict=True):
            results[row] = Caption(tokenizer.decode(line), log_prob, line)
    return results


def decode_words(decoder, features, prompt_ids, limit, tokenizer, cached, pick):
    """The loop of `caption` for features f[B, n, De]: -> (ids i64[B, <=limit], log-probabilities f[B])."""
    B, n = features.shape[:2]
    ids = torch.tensor(prompt_ids, dtype=torch.long, device=features.device).expand(B, -1)
    x = torch.cat([decoder.connector(features), decoder.embed_text(ids)], dim=1)
    caches = make_caches(decoder.trunk, n + limit) if cached else None
    log_prob = torch.zeros(B, device=features.device)
    done = torch.zeros(B, dtype=torch.bool, device=features.device)
    causal = True  # the first call reads many positions at once, later ones a single one
    while True:
        logits = decoder.text_head(decoder.trunk(x, causal=causal, caches=caches)[:, -1])[:, : tokenizer.vocab_size].float()
        token = pick(logits).masked_fill(done, tokenizer.eos)
        log_prob += logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0].masked_fill(done, 0.0)
        ids = torch.cat([ids, token[:, None]], dim=1)
        done |= token == tokenizer.eos
        if ids.shape[1] == limit or done.all():
            return ids, log_prob
        new = decoder.embed_text(token[:, None], start=ids.shape[1])
        x, causal = (new, False) if cached else (torch.cat([x, new], dim=1), True)


@torch.inference_mode()
def score(model, patches, grid, tokenizer, captions):
    """How likely each caption is for one image: patches u8[1, n, P], grid i64[1, 2] -> f[len(captions)].

    Log-probability of the caption's tokens and its end, in nats. Raises ValueError on an empty caption.
    """
    config, decoder = model.config, model.decoder
    ids = [tokenizer.encode(text, config.max_tokens) for text in captions]
    length = max(map(len, ids))
    tokens = torch.tensor([line + [0] * (length - len(line)) for line in ids], device=patches.device)
    features = model.encoder(pixels_to_float(patches, config.pixel_mean, config.pixel_std), grid).expand(len(ids), -1, -1)
    _, states = decoder(features, grid.prod(dim=1).expand(len(ids)), tokens[:, :-1])
    log_probs = decoder.text_head(states).float().log_softmax(dim=-1).gather(2, tokens[..., None])[..., 0]  # [C, T]
    counts = torch.tensor([len(line) for line in ids], device=patches.device)
    return log_probs.masked_fill(torch.arange(length, device=patches.device) >= counts[:, None], 0.0).sum(dim=1)


def patch_pixels(model, states):
    """Decoder states f[B, K, Dd] -> the patches that they predict, as raw pixels u8[B, K, P]."""
    patches = model.decoder.pixel_head(states).float()
    if not model.config.raw_pixels:
        mean, log_std = model.decoder.stats_head(states).float().split(1, dim=-1)
        patches = denormalize_patches(patches, mean, log_std.exp())
    return float_to_pixels(patches, model.config.pixel_mean, model.config.pixel_std)


@torch.inference_mode()
def complete(model, patches, grid, num_given, cached=True):
    """Keep the first `num_given` patches in raster order and generate the rest.

    Args: model: AIMv2; patches: u8[B, n, P] raw pixels of one grid (those beyond `num_given` are not looked at);
        grid: i64[B, 2]; num_given: M in 1 .. n-1; cached: False recomputes everything for each patch.
    Returns: u8[B, n, P], given and generated.
    Raises: ValueError if num_given is out of range or the grids differ in size.
    """
    config, encoder, decoder = model.config, model.encoder, model.decoder
    B, n, _ = patches.shape
    check_given(num_given, grid, n)
    pixels = patches[:, :num_given]
    positions = encoder.positions(grid, n)
    caches = (make_caches(encoder.trunk, n), make_caches(decoder.trunk, n)) if cached else (None, None)
    prefix_len = torch.full((B,), num_given, device=patches.device)
    first = 0  # of the patches that are still to be read
    while True:
        x = encoder.norm(encoder.proj(pixels_to_float(pixels[:, first:], config.pixel_mean, config.pixel_std)))
        x = x + positions[:, first : pixels.shape[1]]
        if cached:  # the prefix sees all of itself; a later patch sees all there is: neither needs a mask
            features = encoder.trunk(x, caches=caches[0])
        else:
            features = encoder.masked_trunk(x, prefix_len)
        states = decoder.trunk(decoder.connector(features), causal=x.shape[1] > 1, caches=caches[1])
        first = pixels.shape[1] if cached else 0
        pixels = torch.cat([pixels, patch_pixels(model, states[:, -1:])], dim=1)
        if pixels.shape[1] == n:
            return pixels


@torch.inference_mode()
def teacher_forced(model, patches, grid, num_given):
    """Like `complete`, but each patch is predicted from the true patches before it: what the image loss measures."""
    config = model.config
    check_given(num_given, grid, patches.shape[1])
    prefix_len = torch.full((len(patches),), num_given, device=patches.device)
    features = model.encoder(pixels_to_float(patches, config.pixel_mean, config.pixel_std), grid, prefix_len)
    states = model.decoder.trunk(model.decoder.connector(features), causal=True)
    return torch.cat([patches[:, :num_given], patch_pixels(model, states[:, num_given - 1 : -1])], dim=1)


def check_given(num_given, grid, n):
    if not 1 <= num_given < n:
        raise ValueError(f"{num_given} of {n} patches given; at least 1 and at most {n - 1} leave something to generate")
    if not bool((grid.prod(dim=1) == n).all()):
        raise ValueError(f"grids {grid.tolist()} in one batch of {n} patches; complete images of equal size together")
