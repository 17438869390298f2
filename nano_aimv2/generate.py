"""Generate: captions by sampling tokens, images by predicting patches, both with KV caches.

*Captions*: the encoder sees the whole image; the decoder reads [image | BOS | prompt] once and then
one token after another.

*Completions*: given the first M patches, patch M is predicted, turned into pixels and fed back
through the encoder and the decoder, and so on. M stays fixed, so only later queries ever attend to
a later patch: what the caches hold never changes, in the encoder's causal region as in the decoder.
The patch sampler draws each patch (patch_sampler.py): another seed gives another image.

Lesson: 11.
"""

from dataclasses import dataclass
from functools import partial

import torch

from nano_aimv2.layers import KVCache
from nano_aimv2.patch_sampler import STEPS, hashed_noise, touching_pixels


@dataclass
class Caption:
    text: str
    log_prob: float  # of the generated tokens under the model, EOS included, in nats
    ids: list


def make_caches(trunk, capacity):
    return [KVCache(capacity) for _ in trunk.blocks]


def choose(logits, temperature, top_k, top_p, generator):
    """logits f[B, V] -> next tokens i64[B]: sampled, or below temperature 1e-6 the likeliest."""
    if temperature < 1e-6:  # float32 logits lie further apart, and their quotient overflows
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:  # keep the likeliest tokens up to the one that reaches top_p
        values, order = logits.sort(descending=True)
        before = values.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        is_beyond = (before >= top_p).gather(-1, order.argsort(dim=-1))
        logits = logits.masked_fill(is_beyond, float("-inf"))
    drawn = torch.multinomial(logits.softmax(dim=-1).cpu(), 1, generator=generator)
    return drawn[:, 0].to(logits.device)


@torch.inference_mode()
def caption(model, patches, grid, tokenizer, prompt="", temperature=0.0, top_k=0, top_p=1.0, seed=0,
            max_tokens=None):
    """Caption images.

    Args:
        model: AIMv2; patches: u8[B, A, P], raw pixels; grid: i64[B, 2], (rows, cols); tokenizer:
            the run's; prompt: text to continue.
        temperature: below 1e-6 greedy; top_k: sample from the k likeliest tokens, 0 from all;
            top_p: from the likeliest that together have this probability; seed: random seed for
            sampling.
        max_tokens: length at which to stop, at most the model's.
    Returns: [Caption] in the order of the images; the text begins with the prompt.
    Raises: ValueError if the prompt fills max_tokens, or a sampling setting is out of range.
    """
    limit = min(max_tokens or model.config.max_tokens, model.config.max_tokens)
    prompt_ids = tokenizer.encode_prompt(prompt)
    if len(prompt_ids) >= limit:
        raise ValueError(f"prompt {prompt!r} has {len(prompt_ids)} tokens; at most {limit - 1} fit "
                         "and leave one to generate: shorten it")
    if not (0 <= temperature < float("inf") and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature} and top_k={top_k} must be numbers of at least "
                         f"0, top_p={top_p} in (0, 1]")
    pick = partial(choose, temperature=temperature, top_k=top_k, top_p=top_p,
                   generator=torch.Generator().manual_seed(seed))
    results, num_patches = [None] * len(patches), grid.prod(dim=1)
    for n in num_patches.unique().tolist():  # what is generated together has one length
        rows = (num_patches == n).nonzero()[:, 0]
        features = model.encoder(patches[rows, :n], grid[rows])
        ids, log_probs = decode_tokens(model.decoder, features, prompt_ids, limit, tokenizer, pick)
        for i, row in enumerate(rows.tolist()):
            line = ids[i].tolist()
            results[row] = Caption(tokenizer.decode(line), float(log_probs[i]), line)
    return results


def decode_tokens(decoder, features, prompt_ids, limit, tokenizer, pick):
    """The loop of `caption`: features f[B, n, De] -> (ids i64[B, <=limit], log-probabilities f[B]).

    Args: pick: logits f[B, V] -> next tokens i64[B]; the rest as in `caption`.
    """
    B, n = features.shape[:2]
    ids = torch.tensor(prompt_ids, dtype=torch.long, device=features.device).expand(B, -1)
    x = torch.cat([decoder.connector(features), decoder.embed_text(ids)], dim=1)
    caches = make_caches(decoder.trunk, n + limit)
    log_prob = torch.zeros(B, device=features.device)
    done = torch.zeros(B, dtype=torch.bool, device=features.device)
    while True:  # the first call reads many positions at once, later ones a single position
        state = decoder.trunk(x, causal=x.shape[1] > 1, caches=caches)[:, -1]
        logits = decoder.text_head(state)[:, : tokenizer.vocab_size].float()
        token = pick(logits).masked_fill(done, tokenizer.eos)
        chosen = logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0]
        log_prob += chosen.masked_fill(done, 0.0)
        ids = torch.cat([ids, token[:, None]], dim=1)
        done |= token == tokenizer.eos
        if ids.shape[1] == limit or done.all():
            return ids, log_prob
        x = decoder.embed_text(token[:, None], start=ids.shape[1])


@torch.inference_mode()
def score(model, patches, grid, tokenizer, captions):
    """How likely each caption is for one image.

    Args: patches: u8[1, n, P], raw pixels; grid: i64[1, 2]; captions: C texts.
    Returns: f[C], log-probability of each caption's tokens and its EOS, in nats.
    Raises: ValueError on an empty caption.
    """
    decoder = model.decoder
    ids = [tokenizer.encode(text, model.config.max_tokens) for text in captions]
    length = max(map(len, ids))
    padded = [line + [0] * (length - len(line)) for line in ids]
    tokens = torch.tensor(padded, device=patches.device)  # i64[C, T]
    counts = torch.tensor([len(line) for line in ids], device=patches.device)
    features = model.encoder(patches, grid).expand(len(ids), -1, -1)
    _, states = decoder(features, grid.prod(dim=1).expand(len(ids)), tokens[:, :-1])
    log_probs = decoder.text_head(states).float().log_softmax(dim=-1)
    log_probs = log_probs.gather(2, tokens[..., None])[..., 0]  # f[C, T]
    is_padding = torch.arange(length, device=patches.device) >= counts[:, None]
    return log_probs.masked_fill(is_padding, 0.0).sum(dim=1)


def draw_patches(model, states, before, grid, first, seed, steps):
    """Draw the patches first, first + 1, .. from the states that predict them.

    Args: states: f[B, K, Dd]; before: u8[B, first + K - 1, P] at least, raw pixels of all patches
        before each of them; grid: i64[B, 2]. The noise follows from (seed, row, patch).
    Returns: raw pixels u8[B, K, P].
    """
    (B, K, _), sampler = states.shape, model.sampler
    padded = torch.cat([before, before[:, :1]], dim=1)  # a place for the patch that comes
    touching = touching_pixels(model.encoder.standardize(padded), grid)[:, first : first + K]
    row, patch = (i.to(states.device).flatten() for i in torch.meshgrid(
        torch.arange(B), torch.arange(first, first + K), indexing="ij"))
    noise = hashed_noise(seed, row, patch, sampler.noise_sizes[1])
    states = states.flatten(0, 1)
    seen = sampler.see(states, model.decoder.pixel_head(states), touching.flatten(0, 1))
    drawn = sampler.sample(seen, noise, steps)
    return model.encoder.to_pixels(drawn.unflatten(0, (B, K)))


@torch.inference_mode()
def complete(model, patches, grid, num_given, seed=0, steps=STEPS):
    """Keep the first `num_given` patches in raster order and generate the rest.

    Args: model: AIMv2; patches: u8[B, n, P], raw pixels of one grid, not read beyond `num_given`;
        grid: i64[B, 2]; num_given: M in 1 .. n-1; seed: another one, and another row of the batch,
        draws other patches; steps: of the sampler, for each patch.
    Returns: u8[B, n, P], given and generated.
    Raises: ValueError if num_given or steps is out of range, or the grids differ in size.
    """
    encoder, decoder = model.encoder, model.decoder
    n = patches.shape[1]
    check_given(num_given, grid, n)
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    positions = encoder.positions(grid, n)
    encoder_caches, decoder_caches = make_caches(encoder.trunk, n), make_caches(decoder.trunk, n)
    pixels, first = patches[:, :num_given], 0  # first: of the patches that are not read yet
    while pixels.shape[1] < n:
        x = encoder.embed(pixels[:, first:]) + positions[:, first : pixels.shape[1]]
        # No mask is needed: the prefix attends to all of itself, a later patch to all so far.
        x = decoder.connector(encoder.trunk(x, caches=encoder_caches))
        states = decoder.trunk(x, causal=x.shape[1] > 1, caches=decoder_caches)
        first = pixels.shape[1]
        drawn = draw_patches(model, states[:, -1:], pixels, grid, first, seed, steps)
        pixels = torch.cat([pixels, drawn], dim=1)
    return pixels


@torch.inference_mode()
def teacher_forced(model, patches, grid, num_given, seed=0, steps=STEPS):
    """Like `complete`, but each patch is drawn given the true patches before it."""
    check_given(num_given, grid, patches.shape[1])
    prefix_len = torch.full((len(patches),), num_given, device=patches.device)
    features = model.encoder(patches, grid, prefix_len)
    states = model.decoder.trunk(model.decoder.connector(features), causal=True)
    drawn = draw_patches(model, states[:, num_given - 1 : -1], patches[:, :-1], grid, num_given,
                         seed, steps)
    return torch.cat([patches[:, :num_given], drawn], dim=1)


def check_given(num_given, grid, n):
    if not 1 <= num_given < n:
        raise ValueError(f"{num_given} of {n} patches given; at least 1 and at most {n - 1} leave "
                         "something to generate")
    if not bool((grid.prod(dim=1) == n).all()):
        raise ValueError(f"grids {grid.tolist()} in one batch of {n} patches; complete images of "
                         "equal size together")
