"""The model against formulas, loops, the paper's sizes and itself."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import random_batch, tiny_config

from nano_aimv2.config import PRESETS, Config
from nano_aimv2.data.batches import Batch, collate
from nano_aimv2.layers import Attention, Block, RMSNorm, Trunk, mask_to_bias
from nano_aimv2.losses import image_loss
from nano_aimv2.model import AIMv2
from nano_aimv2.patchify import normalize_patches
from nano_aimv2.positions import resize_table, sincos_2d
from nano_aimv2.prefix_mask import prefix_mask
from nano_aimv2.training.metrics import encoder_flops, train_flops


def close(a, b, tolerance=1e-5):
    difference = float((a - b).detach().abs().max())
    assert difference <= tolerance, f"largest difference {difference:.3g}, allowed {tolerance:.3g}"


def millions_of(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("preset, millions", [
    ("base", 85.60), ("large", 309.20), ("huge", 680.85), ("1b", 1234.96), ("3b", 2720.66)])
def test_encoder_sizes_are_the_papers(preset, millions):
    with torch.device("meta"):
        model = AIMv2(Config.from_preset(preset))
    found = millions_of(model.encoder)
    assert abs(found - millions) < 0.005, f"{preset} has {found:.3f}M parameters"


@pytest.mark.parametrize("size, millions", [(336, 309.53), (448, 309.98)])
def test_larger_images_only_enlarge_the_position_table(size, millions):
    with torch.device("meta"):
        model = AIMv2(Config.from_preset("large", image_size=size))
    assert abs(millions_of(model.encoder) - millions) < 0.005


def test_the_native_encoder_has_no_table():
    with torch.device("meta"):
        model = AIMv2(Config.from_preset("large", positions="sincos"))
    assert abs(millions_of(model.encoder) - 308.94) < 0.005


def test_every_preset_has_head_dim_128_and_a_decoder_of_12_x_1024():
    for name in set(PRESETS) - {"toy"}:
        config = Config.from_preset(name)
        if config.image_size >= 224:
            assert config.embed_dim // config.num_heads == 128
            assert config.decoder_dim // config.decoder_heads == 128
            assert (config.decoder_dim, config.decoder_blocks) == (1024, 12)
            assert config.decoder_mlp_hidden_dim == 2816


def test_the_decoder_has_the_papers_size_at_its_vocabulary():
    with torch.device("meta"):
        model = AIMv2(Config.from_preset("large", vocab_size=32_000))
    of_the_paper = millions_of(model.decoder)
    assert abs(of_the_paper - 221) < 0.5


def test_rms_norm_and_its_gradient_follow_the_formula():
    x, weight = torch.randn(3, 5, 24, dtype=torch.float32), torch.rand(24)
    grad = torch.randn_like(x)
    ours = RMSNorm(24)
    ours.weight.data = weight.clone()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours(a).backward(grad)
    reference_weight = weight.clone().requires_grad_()
    (b / (b.square().mean(-1, keepdim=True) + 1e-5).sqrt() * reference_weight).backward(grad)
    close(a.grad, b.grad)
    close(ours.weight.grad, reference_weight.grad, 1e-4)


def test_attention_equals_naive_loops():
    torch.manual_seed(0)
    attention = Attention(24, 3)
    x, mask = torch.randn(2, 7, 24), prefix_mask(torch.tensor([3, 5]), 7)
    out = attention(x, mask_to_bias(mask))
    q, k, v = attention.qkv.weight.chunk(3)
    for b in range(2):
        for query in range(7):
            heads = []
            for h in range(3):
                part = slice(8 * h, 8 * h + 8)
                keys = [j for j in range(7) if mask[b, 0, query, j]]
                scores = torch.stack([(q[part] @ x[b, query]) @ (k[part] @ x[b, j]) for j in keys])
                weights = (scores / math.sqrt(8)).softmax(0)
                values = [v[part] @ x[b, j] for j in keys]
                heads.append(sum(w * value for w, value in zip(weights, values, strict=True)))
            close(out[b, query], attention.proj.weight @ torch.cat(heads))


def test_written_out_attention_equals_the_fused_kernel():
    torch.manual_seed(0)
    attention, x = Attention(24, 3), torch.randn(2, 7, 24)
    bias = mask_to_bias(prefix_mask(torch.tensor([3, 5]), 7))
    for arguments in ({"bias": bias}, {"causal": True}, {}):
        with torch.no_grad():
            fused = attention(x, **arguments)
        close(attention(x, **arguments), fused, 1e-6)


def test_swiglu_and_block_follow_the_formula():
    torch.manual_seed(0)
    block, x = Trunk(24, 1, 3, 40).blocks[0], torch.randn(2, 7, 24)
    y = x + block.attn(F.rms_norm(x, (24,), block.norm_1.weight, 1e-5))
    h = F.rms_norm(y, (24,), block.norm_2.weight, 1e-5)
    mlp = block.mlp
    close(block(x), y + (F.silu(h @ mlp.fc1.weight.T) * (h @ mlp.fc3.weight.T)) @ mlp.fc2.weight.T)


def test_sincos_positions_encode_the_column_first():
    table = sincos_2d(torch.tensor([[3, 5]]), 15, 16)[0]
    omega = [10000 ** (-i / 4) for i in range(4)]
    for row in range(3):
        for col in range(5):
            expected = [f(p * w) for p in (col, row) for f in (math.sin, math.cos) for w in omega]
            close(table[row * 5 + col], torch.tensor(expected), 1e-6)


def test_a_position_table_resizes_to_itself_and_exactly_on_a_ramp():
    table = torch.randn(5 * 7, 6)
    assert torch.equal(resize_table(table, (5, 7), (5, 7)), table)
    ramp = torch.arange(8.0).repeat(8)[:, None]  # grows by 1 per column
    resized = resize_table(ramp, (8, 8), (8, 16)).reshape(8, 16)
    expected = (torch.arange(16.0) + 0.5) / 2 - 0.5  # new place k is old place (k + 0.5) / 2 - 0.5
    close(resized[:, 4:12], expected[4:12].expand(8, 8), 1e-5)  # away from the border


def test_padding_changes_nothing():
    model = AIMv2(tiny_config())
    both = random_batch(model.config, size=2, num_tokens=(7, 4), grids=[(3, 4), (5, 5)])
    prefix_len = torch.tensor([5, 9])
    padded = model(both, prefix_len)
    features = model.encoder(both.patches, both.grid)
    alone = []
    for b, n in enumerate((12, 25)):
        here = slice(b, b + 1)
        one = Batch(both.patches[here, :n], both.grid[here], both.tokens[here],
                    both.num_tokens[here], slice(0, 1), 1, first_row=b)
        alone.append(model(one, prefix_len[here]))
        close(features[b, :n], model.encoder(one.patches, one.grid)[0])
    for name in ("image_sum", "image_count", "text_sum", "text_count", "sampler_sum"):
        close(getattr(padded, name), sum(getattr(one, name) for one in alone), 1e-3)


def test_image_and_text_touch_and_the_decoder_is_causal():
    model = AIMv2(tiny_config())
    batch = random_batch(model.config, size=2, num_tokens=(7, 4), grids=[(3, 4), (5, 5)])
    features = torch.randn(2, 25, 24)
    _, states = model.decoder(features, batch.grid.prod(dim=1), batch.tokens)
    image = model.decoder.connector(features[:1, :12])
    x = torch.cat([image, model.decoder.embed_text(batch.tokens[:1])], dim=1)
    close(states[0], model.decoder.trunk(x, causal=True)[0, 12:])
    changed = batch.tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % model.config.vocab_size
    _, later = model.decoder(features, batch.grid.prod(dim=1), changed)
    assert torch.equal(states[:, :4], later[:, :4])
    assert not torch.allclose(states[:, 4], later[:, 4])


def test_step_zero_losses_are_chance():
    torch.manual_seed(0)
    config = tiny_config(decoder_dim=128, embed_dim=96, decoder_blocks=6)
    losses = AIMv2(config)(random_batch(config), torch.tensor([3, 8, 2]))
    text = (losses.text_sum / losses.text_count).item()
    image = (losses.image_sum / losses.image_count).item()
    assert abs(text - math.log(config.vocab_size)) < 0.25, text
    assert 0.95 < image < 1.35, image  # 1 + the small variance of the untrained head: 1.14 here


def test_zero_prediction_scores_p_minus_one_over_p():
    target = normalize_patches(torch.randn(50, 48))[0]
    total, count = image_loss(torch.zeros(50, 48), target)
    assert float(total / count) == pytest.approx(47 / 48, abs=1e-4)


def test_the_image_loss_pools_all_patches_of_the_batch():
    model = AIMv2(tiny_config())
    batch, M = random_batch(model.config), torch.tensor([24, 2, 13])
    losses = model(batch, M)
    patches = model.encoder.standardize(batch.patches)
    features = model.encoder(batch.patches, batch.grid, M)
    states, _ = model.decoder(features, batch.grid.prod(dim=1), batch.tokens[:, :-1])
    errors = []
    for b in range(3):
        for k in range(int(M[b]), 25):
            patch = patches[b, k]
            target = (patch - patch.mean()) / (patch.var(correction=1) + 1e-6).sqrt()
            errors.append((model.decoder.pixel_head(states[b, k - 1]) - target).square().mean())
    assert int(losses.image_count) == len(errors) == 1 + 23 + 12
    close(losses.image_sum / losses.image_count, torch.stack(errors).mean())


def test_the_end_token_is_trained_and_padding_is_not():
    model = AIMv2(tiny_config())
    batch = random_batch(model.config)
    batch.tokens[0, 6] = eos = 700  # the last of 7 valid tokens; 700 occurs nowhere else
    batch.tokens[batch.tokens == eos] = 1
    batch.tokens[0, 6] = eos
    batch.tokens[1, 4:] = 600  # padding: an id that no valid place holds
    batch.tokens[batch.tokens == 601] = 1
    losses = model(batch, torch.tensor([3, 8, 2]))
    (gradient,) = torch.autograd.grad(losses.text_sum, model.decoder.text_head.weight)
    assert int(losses.text_count) == 7 + 4 + 9
    # A target pulls its row of the head by a whole state, the other rows by their probability.
    pull = gradient.abs().amax(dim=1)
    assert pull[eos] > 10 * pull[601], "EOS is a target like any token"
    assert pull[600] < pull[eos] / 10, "padding is not"


def test_the_patch_sampler_leaves_the_papers_objective_alone():
    model = AIMv2(tiny_config())
    losses = model(random_batch(model.config), torch.tensor([3, 8, 2]))
    losses.sampler_sum.backward()
    touched = [name for name, p in model.named_parameters() if p.grad is not None]
    own = [name for name, _ in model.named_parameters() if name.startswith("sampler.")]
    assert touched == own != []


def test_an_empty_target_set_is_an_error():
    model = AIMv2(tiny_config())
    losses = model(random_batch(model.config), torch.tensor([3, 8, 2]))
    with pytest.raises(ValueError, match="at least 1"):
        losses.total(0.4, 0, 12)
    with pytest.raises(ValueError, match="at least 1"):
        losses.total(0.0, 5, 0)


def test_captions_alone_and_images_alone_train_their_head_and_the_encoder():
    model = AIMv2(tiny_config())
    batch, n = random_batch(model.config), torch.full((3,), 25)
    for alpha, text_weight, prefix_len, trained in (
            (0.0, 1.0, n, "text"), (0.4, 0.0, torch.tensor([3, 8, 2]), "pixel")):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # M = n: not one target patch
            losses = model(batch, prefix_len)
        counts = int(losses.image_count), int(losses.text_count)
        losses.total(alpha, *counts, text_weight).backward()
        heads = {"text": model.decoder.text_head, "pixel": model.decoder.pixel_head}
        heads = {name: float(head.weight.grad.abs().max()) for name, head in heads.items()}
        assert heads.pop(trained) > 0 and set(heads.values()) == {0.0}, (trained, heads)
        assert float(model.encoder.proj.weight.grad.abs().max()) > 0


def test_raw_targets_are_the_pixels_themselves():
    model = AIMv2(tiny_config(raw_pixels=True))
    torch.nn.init.zeros_(model.decoder.pixel_head.weight)  # predicts zero
    batch, M = random_batch(model.config), torch.tensor([3, 8, 2])
    pixels = model.encoder.standardize(batch.patches)
    square = sum(float(pixels[i, m:].square().mean(dim=1).sum()) for i, m in enumerate(M.tolist()))
    assert model(batch, M).image_sum.item() == pytest.approx(square, rel=1e-5)


def test_a_caption_as_long_as_max_tokens_fits_where_batches_round_its_length_up():
    config = tiny_config(max_tokens=13)
    batch = random_batch(config, num_tokens=(13, 4, 9))
    padded = replace(batch, tokens=F.pad(batch.tokens, (0, 3)))  # 16, as a collated batch has it
    model, M = AIMv2(config), torch.tensor([3, 8, 2])
    expected = model(batch, M).text_sum.item()
    assert model(padded, M).text_sum.item() == pytest.approx(expected, rel=1e-6)


def test_q_k_v_are_initialised_each_by_itself_and_heads_are_small():
    torch.manual_seed(0)
    model = AIMv2(tiny_config(embed_dim=96, decoder_dim=128))
    qkv = model.encoder.trunk.blocks[0].attn.qkv.weight
    bound = math.sqrt(6 / (96 + 96))
    assert bound * 0.98 < qkv.abs().max().item() <= bound
    head, positions = model.decoder.text_head.weight.detach(), model.decoder.text_positions.detach()
    assert float(head.std()) == pytest.approx((3 * 128) ** -0.5, rel=0.05)
    assert float(positions.std()) == pytest.approx(0.01, rel=0.1)


def hooked(module_kind, model, look):
    """Call look(inputs) whenever a module of a kind runs."""
    for module in model.modules():
        if isinstance(module, module_kind):
            module.register_forward_pre_hook(lambda _, inputs: look(inputs))


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_under_autocast_the_residual_stream_is_float32_in_both_trunks(positions):
    config = tiny_config(positions=positions)
    model, batch, seen = AIMv2(config), random_batch(config), []
    hooked(Block, model, lambda inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch, torch.tensor([2, 9, 20]))
    assert seen == [torch.float32] * (config.num_blocks + config.decoder_blocks)


def test_the_bias_of_the_mask_is_made_once_in_the_precision_of_the_matmuls():
    config = tiny_config()
    model, batch, seen = AIMv2(config), random_batch(config), []
    hooked(Attention, model.encoder, lambda inputs: seen.append(inputs[1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch, torch.tensor([2, 9, 20]))
    assert len(seen) == config.num_blocks and len(set(map(id, seen))) == 1
    assert seen[0].dtype == torch.bfloat16
    model(batch, torch.tensor([2, 9, 20]))
    assert seen[-1].dtype == torch.float32


def test_where_images_fill_their_grids_the_decoder_concatenates_and_nothing_changes():
    config = tiny_config()
    model, batch = AIMv2(config), random_batch(config)
    full = replace(batch, is_full=True)
    prefix_len = torch.tensor([2, 9, 20])
    gathered, concatenated = (model(b, prefix_len).total(0.4, 50, 20) for b in (batch, full))
    assert torch.equal(gathered, concatenated)
    pixels = [np.zeros((20, 20, 3), np.uint8), np.zeros((20, 16, 3), np.uint8)]
    assert collate(pixels[:1] * 2, [[1], [2]], 25, 4, slice(0, 2), 2).is_full
    assert not collate(pixels, [[1], [2]], 25, 4, slice(0, 2), 2).is_full
    assert not collate(pixels[:1], [[1]], 26, 4, slice(0, 1), 1).is_full


def test_a_wrong_number_of_targets_is_an_error():
    config = tiny_config()
    model, batch = AIMv2(config), random_batch(config)
    prefix_len = torch.tensor([2, 9, 20])
    right = int((25 - prefix_len).sum()), int(batch.num_tokens.sum())
    model(batch, prefix_len, right)
    for wrong in ((right[0] + 1, right[1]), (right[0] - 1, right[1]), (right[0], right[1] + 1)):
        with pytest.raises(ValueError, match="targets given; the masks have"):
            model(batch, prefix_len, wrong)


def test_a_step_reads_nothing_back_from_the_device():
    """The meta device has no values: what asks for one fails there, and waits on a GPU."""
    config = tiny_config()
    with torch.device("meta"):
        model = AIMv2(config)
    batch = random_batch(config)
    prefix_len = torch.tensor([2, 9, 20])
    targets = int((25 - prefix_len).sum()), int(batch.num_tokens.sum())
    for is_full in (True, False):
        model.to("meta")  # the buffers, too
        losses = model(replace(batch.to("meta"), is_full=is_full), prefix_len.to("meta"), targets)
        losses.total(0.4, *targets).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_counted_flops_are_torchs():
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(positions="learned")
    model, batch, M = AIMv2(config), random_batch(config), torch.tensor([3, 8, 2])
    with FlopCounterMode(display=False) as counter:
        losses = model(batch, M)
        losses.total(0.4, losses.image_count, losses.text_count).backward()
    targets = int(losses.image_count) / 3, int(losses.text_count) / 3
    ours = 3 * train_flops(config, 25, 9, *targets)
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-3)
    with FlopCounterMode(display=False) as counter:
        model.encoder(torch.randn(1, 25, 48), torch.tensor([[5, 5]]))
    assert encoder_flops(config, 25) == pytest.approx(counter.get_total_flops(), rel=1e-3)
