"""Frozen features and the probes trained on them."""

import copy
import dataclasses
import functools
import json
import re

import numpy as np
import pytest
import torch
from helpers import colour_shares, run_script, tiny_config

from nano_aimv2 import hub
from nano_aimv2.data.shards import ShardWriter
from nano_aimv2.encoder import Encoder
from nano_aimv2.lab import heads, probe
from nano_aimv2.lab.heads import GRID, Heads, knn, predict, probe_tokens, train_heads, wilson
from nano_aimv2.lab.plots import BLUE, GREY, ORANGE
from nano_aimv2.lab.probe import Labelled, frozen_features, label_ids, probe_encoder, random_twin
from nano_aimv2.patchify import pixels_to_float
from nano_aimv2.training.checkpoint import load_model

Settings = functools.partial(heads.Settings, device="cpu")


def separable(count=400, seed=0):
    """Tokens f16[N, 5, 12], one of which, at a random place, holds the classes; {"kind": ids,
    "other": ids}."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(0, 1, (count, 5, 12))
    kind, other = rng.integers(3, size=count), rng.integers(2, size=count)
    spot = rng.integers(5, size=count)
    tokens[np.arange(count), spot, kind] += 6
    tokens[np.arange(count), spot, 3 + other] += 6
    return tokens.astype(np.float16), {"kind": torch.tensor(kind), "other": torch.tensor(other)}


def as_labels(train, test):
    classes = {name: list(range(int(train[name].max()) + 1)) for name in train}
    return {name: (train[name], test[name], classes[name]) for name in train}


def perturbed(heads, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return heads


@pytest.mark.parametrize("num_heads", (3, 0))
def test_heads_trained_side_by_side_equal_each_trained_alone(num_heads):
    tokens, ids = separable(60)
    tokens = tokens if num_heads else tokens[:, :1]
    settings = Settings(epochs=4, batch_size=16, seed=5)
    lr, decay = torch.tensor([2e-3, 5e-2, 1e-3]), torch.tensor([0.1, 0.05, 0.5])
    targets, rows = torch.stack([ids["kind"], ids["other"], ids["kind"]]), torch.arange(50)
    together = Heads(12, num_heads, torch.tensor([3, 3, 3]), seed=5)
    train_heads(together, tokens, rows, targets, lr, decay, settings)
    for h in range(3):
        alone = Heads(12, num_heads, torch.tensor([3]), seed=5)
        own = slice(h, h + 1)
        train_heads(alone, tokens, rows, targets[own], lr[own], decay[own], settings)
        for (name, ours), theirs in zip(together.named_parameters(), alone.parameters(),
                                        strict=True):
            worst = (ours[h] - theirs[0]).abs().max().item()
            assert worst < 1e-5, (name, h, worst)


def test_the_update_is_torchs_adamw_with_clipping_and_cosine():
    tokens, ids = separable(32)
    settings = Settings(epochs=5, batch_size=32)
    heads = perturbed(Heads(12, 2, torch.tensor([3])))
    with torch.no_grad():
        heads.weight.mul_(40)  # gradients beyond the clip
    theirs = copy.deepcopy(heads)
    train_heads(heads, tokens, torch.arange(32), ids["kind"][None], torch.tensor([1e-2]),
                torch.tensor([0.1]), settings)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.999),
                                  weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5, eta_min=1e-5)
    norms = []
    for _ in range(5):
        optimizer.zero_grad()
        logits = theirs(torch.from_numpy(tokens).float(), torch.ones(32, 5, dtype=torch.bool))[0]
        torch.nn.functional.cross_entropy(logits, ids["kind"]).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 3.0)))
        optimizer.step()
        schedule.step()
    assert max(norms) > 3
    for ours, other in zip(heads.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(ours, other, atol=1e-5), (ours - other).abs().max()


def test_reading_through_the_query_equals_attention_with_keys_and_values():
    torch.manual_seed(0)
    heads = perturbed(Heads(12, 3, torch.tensor([4, 4]))).eval()
    x = torch.randn(7, 5, 12)
    found = heads(x, torch.ones(7, 5, dtype=torch.bool))
    x = heads.norm(x.flatten(0, 1)).view(7, 5, 12)
    for h in range(2):
        k, v = (x @ w[h].reshape(12, 12).T for w in (heads.k, heads.v))
        k, v = (t.view(7, 5, 3, 4).transpose(1, 2) for t in (k, v))  # [B, heads, n, hd]
        query = heads.query[h].expand(7, 3, 1, 4)
        pooled = torch.nn.functional.scaled_dot_product_attention(query, k, v)
        expected = pooled.flatten(1) @ heads.weight[h] + heads.bias[h]
        assert torch.allclose(found[h], expected, atol=1e-5), (found[h] - expected).abs().max()


def test_the_order_of_patches_and_what_pads_them_do_not_matter():
    torch.manual_seed(0)
    heads = perturbed(Heads(12, 3, torch.tensor([4, 2])))
    x = torch.randn(6, 5, 12)
    is_valid = torch.arange(5) < torch.tensor([5, 3, 4, 2, 5, 1])[:, None]
    for training in (True, False):
        heads.train(training)
        expected = copy.deepcopy(heads)(x, is_valid)
        order = torch.tensor([3, 0, 4, 2, 1])
        found = copy.deepcopy(heads)(x[:, order], is_valid[:, order])
        assert torch.allclose(found, expected, atol=1e-5)
        other = torch.where(is_valid[..., None], x, torch.full_like(x, 1e4))
        assert torch.equal(copy.deepcopy(heads)(other, is_valid), expected)
        moved = x.clone()
        moved[1, 2] += 1  # the last valid patch of image 1
        assert not torch.allclose(copy.deepcopy(heads)(moved, is_valid)[:, 1], expected[:, 1])
    assert expected[1, :, 2:].eq(float("-inf")).all() and expected[1, :, :2].isfinite().all()


def test_evaluation_uses_running_statistics_and_leaves_them():
    tokens, ids = separable(80)
    heads = Heads(12, 3, torch.tensor([3]))
    targets = ids["kind"][None]
    train_heads(heads, tokens, torch.arange(80), targets, torch.tensor([1e-3]), torch.tensor([0.1]),
                Settings(epochs=2, batch_size=20))
    before = copy.deepcopy(heads.state_dict())
    assert before["norm.num_batches_tracked"] == 8
    whole, _ = predict(heads, tokens, torch.arange(80), targets, "cpu")
    alone = [predict(heads, tokens, torch.tensor([i]), targets, "cpu")[0] for i in range(80)]
    assert torch.equal(whole, torch.cat(alone, dim=1)), "an answer depends on its batch"
    assert all(torch.equal(value, before[name]) for name, value in heads.state_dict().items())


def test_a_separable_problem_is_learnt_and_permuted_labels_are_not(monkeypatch):
    monkeypatch.setattr("nano_aimv2.lab.heads.GRID", GRID[-4:])  # the others take their time
    (train, ids), (test, test_ids) = separable(400), separable(400, seed=1)
    settings = Settings(epochs=25, batch_size=40, k=9)
    labels = as_labels(ids, test_ids)
    found = probe_tokens(train, test, labels, 3, settings)
    assert min(found[name]["top1"] for name in ids) > 0.8, found
    mean = [torch.from_numpy(x.astype(np.float32).mean(axis=1)) for x in (train, test)]
    linear = probe_tokens(*(m.half()[:, None].numpy() for m in mean), labels, 0, settings)
    neighbours = knn(*mean, labels, settings)
    assert linear["other"]["top1"] > 0.7 and neighbours["kind"]["top1"] > 0.6, (linear, neighbours)
    assert (found["kind"]["lr"], found["kind"]["weight_decay"]) in GRID
    generator = torch.Generator().manual_seed(0)
    # Both parts are permuted: otherwise a cluster whose training labels have a majority by accident
    # would be all right or all wrong.
    shuffled = [{name: part[name][torch.randperm(400, generator=generator)] for name in part}
                for part in (ids, test_ids)]
    mixed = as_labels(*shuffled)
    for scores in (probe_tokens(train, test, mixed, 3, settings), knn(*mean, mixed, settings)):
        assert scores["kind"]["top1"] < 1 / 3 + 0.15, scores
        assert scores["other"]["top1"] < 1 / 2 + 0.15, scores


def test_test_images_choose_nothing():
    (train, ids), (test, test_ids) = separable(120), separable(50, seed=1)
    settings = Settings(epochs=3, batch_size=40)
    changed = {**test_ids, "kind": (test_ids["kind"] + 1) % 3}
    found, other = (probe_tokens(train, test, as_labels(ids, labels), 3, settings)["kind"]
                    for labels in (test_ids, changed))
    assert (found["lr"], found["weight_decay"]) == (other["lr"], other["weight_decay"])


def test_knn_votes_by_similarity():
    near, far = [1.0, 0.05], [0.6, 0.8]  # one very similar image outvotes two that are less so
    labels = {"kind": (torch.tensor([0, 1, 1]), torch.tensor([0]), [0, 1])}
    train, test = torch.tensor([near, far, far]), torch.tensor([[5.0, 0.0]])
    assert knn(train, test, labels, Settings(k=3))["kind"]["top1"] == 1
    with pytest.raises(ValueError, match="k=4 neighbours must be at most the 3 training images"):
        knn(train, test, labels, Settings(k=4))


@pytest.mark.parametrize("right,count,low,high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (29, 29, 0.8830, 1)])
def test_wilsons_interval_is_the_published_one(right, count, low, high):
    """Newcombe 1998, table I, method 3 (score without continuity correction)."""
    assert wilson(right, count) == pytest.approx((low, high), abs=6e-5)


def images(count, config, seed=0):
    rng = np.random.default_rng(seed)
    side = config.image_size // config.patch_size
    patches = rng.integers(256, size=(count, side * side, config.patch_dim), dtype=np.uint8)
    return Labelled(patches, (side, side),
                    {"label": ["even" if i % 2 else "odd" for i in range(count)]})


def test_cached_features_equal_fresh_ones_and_nothing_stale_is_read(tmp_path):
    torch.manual_seed(0)
    config = tiny_config()
    encoder, data = Encoder(config), images(7, config)
    fresh = frozen_features(encoder, data)
    first = frozen_features(encoder, data, cache=tmp_path / "train")
    assert fresh.dtype == first.dtype == np.float16 and np.array_equal(fresh, first)
    path, = tmp_path.glob("*")
    written = path.stat().st_mtime_ns
    again = frozen_features(encoder, data, cache=tmp_path / "train")
    assert np.array_equal(fresh, again) and path.stat().st_mtime_ns == written
    changed = copy.deepcopy(encoder)
    with torch.no_grad():
        changed.trunk.blocks[0].attn.proj.weight[0, 0] += 1
    other_heads = Encoder(dataclasses.replace(config, num_heads=4))
    other_heads.load_state_dict(encoder.state_dict())
    one_pixel = images(7, config)
    one_pixel.patches[6, 0, 0] ^= 1
    other_mean = Encoder(dataclasses.replace(config, pixel_mean=(0.4, 0.5, 0.6)))
    other_mean.load_state_dict(encoder.state_dict())
    for e, d in ((changed, data), (other_heads, data), (encoder, one_pixel),
                 (encoder, images(5, config)), (other_mean, data)):
        cached = frozen_features(e, d, cache=tmp_path / "train")
        assert np.array_equal(cached, frozen_features(e, d))
        assert not np.array_equal(cached, fresh)
        assert len(list(tmp_path.glob("*"))) == 1  # older ones are gone


def test_features_are_the_bidirectional_last_layer_and_the_encoder_stays_frozen():
    torch.manual_seed(0)
    config = tiny_config()
    encoder = Encoder(config).eval()
    train, test = images(24, config), images(6, config, seed=1)
    before = copy.deepcopy(encoder.state_dict())
    found = probe_encoder(encoder, train, test, Settings(epochs=2, batch_size=8, k=3))
    assert found.keys() == {"attentive", "linear", "k-NN"}
    assert found["linear"]["label"]["images"] == 6
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    patches = pixels_to_float(torch.from_numpy(test.patches), config.pixel_mean, config.pixel_std)
    expected = encoder(patches, torch.tensor([test.grid] * 6)).detach()
    features = torch.from_numpy(frozen_features(encoder, test)).float()
    assert torch.allclose(features, expected, atol=5e-3)


def test_a_random_twin_shares_the_shapes_and_no_weight():
    config = tiny_config(positions="learned")
    encoder = Encoder(config)
    twin, same = random_twin(encoder, 1), random_twin(encoder, 1)
    for (name, ours), theirs, repeated in zip(encoder.named_parameters(), twin.parameters(),
                                              same.parameters(), strict=True):
        assert ours.shape == theirs.shape and torch.equal(theirs, repeated)
        assert torch.equal(ours, theirs) == ("norm" in name), name


def test_labels_that_cannot_be_probed_are_refused():
    def check(train, test, message):
        with pytest.raises(ValueError, match=message):
            label_ids({"label": list(train)}, {"label": list(test)})

    check("aaaa", "aa", "all images are 'a'")
    check("aabb", "abz", "too few for 3 classes")
    check("aabbaabb", "abz", "1 classes are among the test images only, the first 'z'")
    check("ab", "ab", "2 training images are too few for 2 classes")
    with pytest.raises(ValueError, match="labelled with place, test images with label"):
        label_ids({"place": ["a"]}, {"label": ["a"]})
    with pytest.raises(ValueError, match="epochs=0 must be at least 1"):
        Settings(epochs=0)


def test_images_without_labels_are_refused_and_damaged_ones_named(tmp_path):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "PNG")
    config = tiny_config()
    with ShardWriter(tmp_path / "none") as writer:
        writer.write("a", file.getvalue(), "png", "a", {})
    with pytest.raises(ValueError, match='none of its 1 samples has a label.*"label_name"'):
        probe.read_labelled(tmp_path / "none", config, 9)
    with ShardWriter(tmp_path / "some") as writer:
        writer.write("a", file.getvalue(), "png", "a", {"label": 3})
        writer.write("b", b"no image", "png", "a", {"label": 3})
        writer.write("c", file.getvalue(), "png", "a", {})
        writer.write("d", file.getvalue(), "png", "a", {"label": 0, "label_name": "cat"})
        star = ["top left", "small", "red", "star"]
        writer.write("e", file.getvalue(), "png", "a", {"objects": [star]})
    with pytest.raises(ValueError, match="mixes toy scenes and labelled images"):
        probe.read_labelled(tmp_path / "some", config, 9)
    found, note = probe.read_labelled(tmp_path / "some", config, 2)
    assert found.labels == {"label": ["3", "cat"]} and found.patches.shape == (2, 25, 48)
    assert "2 labelled images; skipped: 1 without exactly one label, 1 unreadable" in note
    assert "b.png: ValueError: not a whole file" in note
    native, _ = probe.read_labelled(tmp_path / "some", tiny_config(native_area=(2, 6)), 2)
    assert np.array_equal(native.patches, found.patches), "native weights get the centre square too"


@pytest.mark.slow
def test_the_command_prints_one_table_and_writes_it(trained, tmp_path):
    from data.scenes import make_scenes

    make_scenes(tmp_path / "scenes", train=200, val=30, novel=1, size=20)
    done = run_script("-m", "nano_aimv2.lab.probe", f"--run_dir={trained[0]}",
                      f"--data={tmp_path}/scenes", f"--out={tmp_path}/out", "--epochs=1", "--k=5",
                      "--device=cpu")
    assert re.search(r"top-1.* place +size +colour +shape\n", done.stdout), done.stdout
    for method in ("attentive", "linear", "k-NN"):
        for row in ("this run", "random weights", "raw pixels"):
            line = rf"^{method} +{row}( +\d\.\d+ \[\d\.\d+ \d\.\d+\]){{4}}$"
            assert len(re.findall(line, done.stdout, re.M)) == 1
    assert max(map(len, done.stdout.splitlines()[2:-1])) <= 130
    saved = json.loads((tmp_path / "out/probe.json").read_text())
    count = saved["rows"]["raw pixels"]["k-NN"]["shape"]["images"]
    assert count == saved["rows"]["this run"]["linear"]["place"]["images"] > 5
    shares = colour_shares(tmp_path / "out/probe.png")  # bars of all three rows are drawn
    bars = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in (BLUE, ORANGE, GREY)]
    assert all(shares.get(bar, 0) > 0.005 for bar in bars), [shares.get(bar) for bar in bars]
    assert sum(1 for _ in (tmp_path / "out/features").glob("*.npy")) == 4


@pytest.mark.slow
def test_a_mistake_is_one_line():
    done = run_script("-m", "nano_aimv2.lab.probe", "--run_dir=nowhere", check=False)
    assert done.returncode, done.stdout
    assert done.stderr.startswith("probe: nowhere has no config.json"), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    with pytest.raises(ValueError, match="device='gpu' must be one of auto, cuda, mps, cpu"):
        probe.main(["--device=gpu"])


def test_a_folder_that_is_not_there_is_named(trained, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/train.* does not exist"):
        probe.main([f"--run_dir={trained[0]}", f"--data={tmp_path}"])


def test_published_weights_are_probed_like_a_run(trained, tmp_path):
    model, config, _ = load_model(trained[0])
    hub.save_encoder(model.encoder, tmp_path / "encoder")
    encoder, data = hub.load_encoder(tmp_path / "encoder"), images(3, config)
    assert np.array_equal(frozen_features(encoder, data), frozen_features(model.encoder, data))
    with pytest.raises(ValueError, match="give --data=FOLDER"):
        probe.main([f"--weights={tmp_path}/encoder"])
