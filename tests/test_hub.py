"""Encoder weights under other people's names, in and out."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from helpers import full_disk, tiny_config
from matplotlib.cbook import get_sample_data
from PIL import Image
from safetensors.torch import load_file, save_file

from nano_aimv2.data.batches import evaluation_pixels
from nano_aimv2.hub import (
    APPLE,
    EncoderConfig,
    load_encoder,
    read_weights,
    save_encoder,
    views,
)
from nano_aimv2.model import AIMv2
from nano_aimv2.patchify import patchify, unpatchify
from nano_aimv2.prefix_mask import prefix_mask
from nano_aimv2.training.checkpoint import load_model

pytestmark = pytest.mark.filterwarnings("ignore:.*CLIP's are assumed")
WHY = ("transformers is not installed: nothing is compared with it here "
       "(pip install -r requirements.txt)")


def tiny_encoder(positions="learned", **overrides):
    """Random weights with every norm and bias away from its start, so that a swapped one shows."""
    torch.manual_seed(3)
    encoder = AIMv2(tiny_config(positions=positions, **overrides)).encoder.eval()
    with torch.no_grad():
        for weight in encoder.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return encoder


def tiny_inputs(rows=5, cols=5, size=2, p=4):
    torch.manual_seed(4)
    pixels = torch.randn(size, 3, rows * p, cols * p)
    return pixels, patchify(pixels, p), torch.tensor([[rows, cols]] * size)


def apple_folder(encoder, folder, **settings):
    """What a repository of Apple's holds: its own config.json and its own names."""
    config = encoder.config
    folder.mkdir()
    weights = {name: weight.contiguous() for name, weight in views(encoder, APPLE).items()}
    save_file(weights, folder / "model.safetensors")
    if config.positions == "learned":
        settings = {"image_size": config.image_size, **settings}
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["AIMv2Model"], "model_type": "aimv2", "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_hidden_dim, "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads, "patch_size": config.patch_size,
        "num_channels": 3, "qkv_bias": False, "use_bias": False, "rms_norm_eps": 1e-5, **settings}))
    return folder


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason=WHY)


def their_model(transformers, native, **settings):
    torch.manual_seed(5)
    config = transformers.Aimv2VisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        image_size=20, patch_size=4, use_head=False, is_native=native, **settings)
    model = transformers.Aimv2VisionModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_((0.3 if weight.ndim == 1 else 0.1) * torch.randn_like(weight))
    return model


def their_features(model, pixels, prefix_len=None):
    """transformers' features; its public call takes no mask, its layers do."""
    with torch.inference_mode():
        if prefix_len is None:
            return model(pixels).last_hidden_state
        x = model.embeddings(pixels)
        bias = torch.zeros(()).masked_fill(~prefix_mask(prefix_len, x.shape[1]), float("-inf"))
        for layer in model.encoder.layers:
            x = layer(x, attention_mask=bias)
        return model.rms_norm(x)


def largest_difference(encoder, model, rows=5, cols=5, prefix_len=None):
    pixels, patches, grid = tiny_inputs(rows, cols)
    with torch.inference_mode():
        ours = encoder(patches, grid, prefix_len)
    theirs = their_features(model, pixels, prefix_len)
    assert ours.std() > 0.1
    return float((ours - theirs).abs().max())


either_mask = pytest.mark.parametrize(
    "prefix_len", [None, torch.tensor([3, 9])], ids=["bidirectional", "prefix"])
either_encoder = pytest.mark.parametrize(
    "positions, grid", [("learned", (5, 5)), ("sincos", (3, 6))], ids=["fixed", "native"])


@either_mask
@either_encoder
def test_transformers_weights_give_transformers_features(transformers, tmp_path, positions, grid,
                                                         prefix_len):
    model = their_model(transformers, native=positions == "sincos")
    model.save_pretrained(tmp_path)
    error = largest_difference(load_encoder(tmp_path), model, *grid, prefix_len)
    assert error < 1e-5, f"largest difference {error}"


@either_mask
@either_encoder
def test_transformers_reads_what_we_save(transformers, tmp_path, positions, grid, prefix_len):
    encoder = tiny_encoder(positions)
    save_encoder(encoder, tmp_path / "out")
    model = transformers.Aimv2VisionModel.from_pretrained(tmp_path / "out").eval()
    error = largest_difference(encoder, model, *grid, prefix_len)
    assert error < 1e-5, f"largest difference {error}"


def test_both_towers_of_transformers_give_the_image_tower(transformers, tmp_path):
    vision = their_model(transformers, native=False)
    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                vocab_size=50, eos_token_id=49)
    both = transformers.Aimv2Model(transformers.Aimv2Config(
        vision_config=vision.config.to_dict() | {"use_head": True}, text_config=text,
        projection_dim=8))
    both.vision_model.load_state_dict(vision.state_dict(), strict=False)
    both.save_pretrained(tmp_path)
    assert largest_difference(load_encoder(tmp_path), vision) < 1e-5


def test_shards_are_read_as_one(transformers, tmp_path):
    model = their_model(transformers, native=False)
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert largest_difference(load_encoder(tmp_path), model) < 1e-5


def their_pixels(transformers, encoder, image, folder):
    """What transformers' processor of a saved encoder makes of a PIL image: f[H, W, 3], 0..255."""
    save_encoder(encoder, folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(image, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
    mean, std = torch.tensor(encoder.config.pixel_mean), torch.tensor(encoder.config.pixel_std)
    return ((pixels * std + mean) * 255).numpy()


def test_transformers_processor_gives_our_pixels_of_an_image_of_the_models_proportions(
        transformers, tmp_path):
    encoder = tiny_encoder()
    pixels = np.random.default_rng(0).integers(256, size=(33, 33, 3), dtype=np.uint8)
    theirs = their_pixels(transformers, encoder, Image.fromarray(pixels), tmp_path / "out")
    ours = evaluation_pixels(Image.fromarray(pixels), encoder.config)
    assert np.abs(theirs - ours).max() < 0.01


def test_transformers_processor_shifts_a_photograph_by_a_fraction_of_a_pixel(
        transformers, tmp_path):
    encoder = tiny_encoder(image_size=224, patch_size=14)
    with get_sample_data("grace_hopper.jpg") as file:  # 512 x 600
        data = file.read()
    image = Image.open(io.BytesIO(data))
    theirs = their_pixels(transformers, encoder, image.copy(), tmp_path / "out")
    whole = np.abs(evaluation_pixels(image.copy(), encoder.config) - theirs).mean()
    reduced = Image.open(io.BytesIO(data))  # a JPEG that is still undecoded is decoded small
    scaled = np.abs(evaluation_pixels(reduced, encoder.config) - theirs).mean()
    assert (round(float(whole), 1), round(float(scaled), 1)) == (1.1, 2.1)  # of 255


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_apples_names_are_read(tmp_path, positions):
    encoder = tiny_encoder(positions)
    loaded = load_encoder(apple_folder(encoder, tmp_path / "apple"))
    pixels, patches, grid = tiny_inputs()
    with torch.inference_mode():
        assert torch.equal(loaded(patches, grid), encoder(patches, grid))
    assert not loaded.training
    assert loaded.config.native_area == (() if positions == "learned" else (7, 12))


def test_a_pixel_scale_that_no_file_says_is_assumed_with_a_warning(tmp_path):
    folder = apple_folder(tiny_encoder(), tmp_path / "apple")
    (folder / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    with pytest.warns(UserWarning, match="neither preprocessor_config.json nor processor_config"):
        assert load_encoder(folder).config.pixel_mean[0] == 0.48145466


def test_the_pixel_scale_of_transformers_processor_config_is_read(transformers, tmp_path):
    # What a processor of images and text writes, as the sole file that says the pixel scale
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    encoder = tiny_encoder(pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.25, 0.5, 0.5))
    theirs = tmp_path / "theirs"
    save_encoder(encoder, theirs)
    transformers.CLIPProcessor(
        image_processor=transformers.AutoImageProcessor.from_pretrained(theirs),
        tokenizer=transformers.CLIPTokenizer(str(tmp_path / "vocab.json"),
                                             str(tmp_path / "merges.txt"))).save_pretrained(theirs)
    (theirs / "preprocessor_config.json").unlink()
    loaded = load_encoder(theirs)
    assert (loaded.config.pixel_mean, loaded.config.pixel_std) == (
        (0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
    pixels, _, grid = tiny_inputs()
    raw = torch.randint(256, (2, 25, 48), dtype=torch.uint8)
    model = transformers.Aimv2VisionModel.from_pretrained(theirs)
    size = pixels.shape[2:]
    images = unpatchify(raw, grid[0].tolist(), 4)
    prepared = (images / 255 - 0.5) / torch.tensor([0.25, 0.5, 0.5])[:, None, None]
    with torch.inference_mode():
        difference = loaded(raw, grid) - model(prepared.reshape(2, 3, *size)).last_hidden_state
    assert float(difference.abs().max()) < 1e-5


def test_apples_kernel_lies_channel_row_column(tmp_path):
    encoder = tiny_encoder()
    weights = load_file(apple_folder(encoder, tmp_path / "apple") / "model.safetensors")
    kernel = weights["preprocessor.patchifier.proj.weight"]
    pixels, patches, _ = tiny_inputs()
    convolved = torch.nn.functional.conv2d(pixels, kernel, encoder.proj.bias, stride=4)
    convolved = convolved.flatten(2).transpose(1, 2)
    assert torch.allclose(convolved, encoder.proj(patches), atol=1e-5)


def test_what_is_saved_is_loaded_again_with_its_pixels(tmp_path):
    encoder = tiny_encoder("sincos", pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.4, 0.5, 0.6))
    save_encoder(encoder, tmp_path / "out")
    loaded = load_encoder(tmp_path / "out")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, encoder.state_dict()[name]), name
    assert isinstance(loaded.config, EncoderConfig)
    assert (loaded.config.pixel_mean, loaded.config.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    # Trained at one size, so used at it
    assert (loaded.config.image_size, loaded.config.native_area) == (20, ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_run_of_ours_is_weights_too(trained):
    run, _ = trained
    loaded, whole = load_encoder(run), load_model(run)[0]
    _, patches, grid = tiny_inputs()
    assert torch.equal(loaded(patches, grid), whole.encoder(patches, grid))
    assert loaded.config == whole.config


def test_half_precision_files_become_float32(tmp_path):
    folder = apple_folder(tiny_encoder(), tmp_path / "apple")
    weights = load_file(folder / "model.safetensors")
    halves = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(halves, folder / "model.safetensors")
    assert {weight.dtype for weight in load_encoder(folder).parameters()} == {torch.float32}


def test_missing_surplus_and_misshapen_weights_are_listed(tmp_path):
    folder = apple_folder(tiny_encoder(), tmp_path / "apple")
    weights = load_file(folder / "model.safetensors")
    del weights["trunk.blocks.1.mlp.fc2.weight"]
    weights["trunk.blocks.0.attn.q_norm.weight"] = torch.ones(8)
    weights["preprocessor.pos_embed"] = torch.zeros(1, 16, 24)
    save_file(weights, folder / "model.safetensors")
    message = (r"missing trunk\.blocks\.1\.mlp\.fc2\.weight; "
               r"preprocessor\.pos_embed is \(1, 16, 24\), its config\.json wants \(1, 25, 24\); "
               r"surplus trunk\.blocks\.0\.attn\.q_norm")
    with pytest.raises(ValueError, match=message):
        load_encoder(folder)


@pytest.mark.parametrize("settings, message", [
    ({"model_type": "siglip_vision_model"}, "model_type='siglip_vision_model'"),
    ({"hidden_act": "gelu", "qkv_bias": True}, "hidden_act='gelu' .* qkv_bias=True"),
    ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06"),
    ({"num_attention_heads": None}, "num_attention_heads=None"),
    ({"num_attention_heads": 5}, "hidden_size=24 must be a multiple"),
    ({"image_size": 22}, "image_size=22 must be a multiple"),
])
def test_another_architecture_is_refused(tmp_path, settings, message):
    folder = apple_folder(tiny_encoder(), tmp_path / "apple", **settings)
    with pytest.raises(ValueError, match=message):
        load_encoder(folder)


def test_a_place_without_weights_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no config.json"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "aimv2", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 3, "patch_size": 4}))
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a repository id"):
        load_encoder(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        load_encoder("apple/aimv2-large-patch14-224")


def test_a_git_lfs_pointer_is_called_that(tmp_path):
    """What a clone without Git LFS leaves in place of the weights."""
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234567\n")
    with pytest.raises(ValueError, match="Git LFS pointer.*git lfs pull"):
        read_weights(tmp_path / "model.safetensors")


def test_a_repository_id_is_fetched_and_a_failure_is_reported(tmp_path, monkeypatch):
    folder = apple_folder(tiny_encoder(), tmp_path / "apple")
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(repo, allow_patterns):
            asked.append(repo)
            if "large" not in repo:
                raise OSError("no such repository\nand more")
            return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert load_encoder("apple/aimv2-large-patch14-224").config.image_size == 20
    with pytest.raises(ValueError, match=r"cannot be fetched \(OSError: no such repository\)"):
        load_encoder("apple/aimv2-small")
    assert asked == ["apple/aimv2-large-patch14-224", "apple/aimv2-small"]


def test_a_full_disk_leaves_no_half_folder_and_an_old_one_is_kept(tmp_path):
    encoder = tiny_encoder()
    with full_disk(), pytest.raises(OSError, match="could not be written"):
        save_encoder(encoder, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    save_encoder(encoder, tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_encoder(encoder, tmp_path / "out")


def test_a_full_batch_without_mask_equals_a_padded_one():
    encoder = tiny_encoder("sincos")
    _, patches, grid = tiny_inputs(rows=3, cols=6)
    padded = torch.cat([patches, torch.randn(2, 5, patches.shape[2])], dim=1)
    with torch.inference_mode():
        assert torch.allclose(encoder(padded, grid)[:, :18], encoder(patches, grid), atol=1e-5)
