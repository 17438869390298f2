"""The bench and the budget: what is counted and printed."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import run_script

from nano_aimv2.config import PRESETS, Config
from nano_aimv2.lab import bench, budget
from nano_aimv2.layers import WRITTEN_OUT, Block

# The budget


def test_the_bytes_that_a_block_keeps_are_those_that_autograd_saves():
    B, N, D, hidden = 2, WRITTEN_OUT[torch.float32] + 31, 96, 160
    torch.manual_seed(0)
    block, x = Block(D, 3, hidden), torch.randn(B, N, D, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = block(x, causal=True)
    counted = sum(kept.values())
    # On a CPU each norm also keeps its normalised input in float32; a GPU's fused kernel does not
    on_cpu = 2 * 4 * N * D
    expected = B * (budget.block_bytes(N, D, hidden, 4, False) + on_cpu)
    assert expected == pytest.approx(counted, rel=0.01), counted
    assert out.shape == x.shape


def test_every_preset_of_the_paper_has_a_budget_and_shards_divide_it():
    for preset in ("large", "huge", "1b", "3b"):
        config = Config.from_preset(preset)
        assert config.batch_size == 8192 and config.weight_decay == 1e-4
        assert config.steps == 1_500_000
    encoder = {"large": 309.20, "huge": 680.85, "1b": 1234.96, "3b": 2720.66}
    for preset, millions in encoder.items():
        lines = budget.report(Config.from_preset(preset), world=64, img_per_s=10_000)
        assert f"{millions:,.1f}M of them the encoder" in lines[0], lines[0]
        assert any("at 10,000 images/s: 14.2 days" in line for line in lines), lines
    config = Config.from_preset("large")
    ddp, fsdp = (budget.memory_per_rank(config, 500e6, 10e6, 64, mode)[0]
                 for mode in ("ddp", "fsdp"))
    assert ddp == pytest.approx(18 * 500e6)
    assert fsdp == pytest.approx(16 * 500e6 / 64 + 12 * 10e6)
    recomputed = budget.activation_bytes(Config.from_preset("large", recompute=True), 8)
    assert recomputed < 0.3 * budget.activation_bytes(config, 8)
    assert set(encoder) < set(PRESETS)


@pytest.mark.slow
def test_a_dry_run_prints_and_trains_nothing(tmp_path):
    done = run_script("train.py", "--preset=3b", "--dry_run", "--world=16", "--img_per_s=5000",
                      f"--run_dir={tmp_path}/x")
    assert "2,982.8M parameters" in done.stdout and "days" in done.stdout
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [
    (["--world=0"], "--world=0 must be a number above 0"),
    (["--wrld=8"], "unknown flag --wrld"),
])
def test_a_dry_run_says_what_is_wrong_in_one_line(flags, message):
    done = run_script("train.py", "--dry_run", *flags, check=False)
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_flags_of_the_budget_need_dry_run():
    with pytest.raises(ValueError, match="need --dry_run"):
        budget.main(Config.from_preset("toy"), world=8)


# The bench


def test_without_the_module_resource_peak_memory_is_not_known(monkeypatch):
    """As on Windows."""
    cpu = torch.device("cpu")
    if importlib.util.find_spec("resource"):
        assert float(bench.peak_memory(cpu).removesuffix(" GiB")) > 0.1
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it raises ImportError
    assert bench.peak_memory(cpu) == "memory not known"


def test_the_bench_is_imported_without_the_module_resource():
    run_script("-c", "import sys; sys.modules['resource'] = None; import nano_aimv2.lab.bench")


@pytest.mark.slow
def test_the_bench_counts_a_step():
    """With one block each: the step is compiled, too, and that takes time for every block."""
    out = run_script("-m", "nano_aimv2.lab.bench", "step", "--preset=toy", "--batch_size=2",
                     "--num_blocks=1", "--decoder_blocks=1", "--dtype=float32").stdout
    for words in ("encoder 192 x 1", "compiled", "matmuls", "images/s", "GiB"):
        assert words in out, f"{words!r} is missing in {out}"


def test_the_bench_says_what_is_wrong_in_one_line():
    done = run_script("-m", "nano_aimv2.lab.bench", "--stepz=1", check=False)
    assert "bench: unknown flag --stepz" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(ValueError, match="did you mean encoder"):
        bench.main(["encode"])
    with pytest.raises(ValueError, match="leave out --steps"):
        bench.main(["data", "--steps=3"])


def test_the_bare_loop_writes_the_tokens_of_the_package():
    config = Config.from_preset("toy", max_tokens=16)
    torch.manual_seed(0)
    decoder = bench.AIMv2(config).eval().decoder
    features = torch.randn(2, 9, config.embed_dim)
    with torch.inference_mode():
        last = bench.bare_loop(decoder, features, 16)
        never_ends = SimpleNamespace(eos=-1, vocab_size=config.vocab_size)
        ids, _ = bench.decode_tokens(decoder, features, [], 16, never_ends,
                                     lambda logits: logits.argmax(dim=-1))
    assert last.tolist() == ids[:, -1].tolist()
