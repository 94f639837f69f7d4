"""The path of a GPU through an expanded model: kernels, no stop at the host, compiled models.

Without a GPU the same code runs on the CPU, its kernels in Triton's interpreter.
"""

import copy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig

from sparse_expansion.algorithms import stored_experts
from sparse_expansion.model import expansion, expert_group
from tests import tiny
from tests.model.running import expand, expanded_linears, logits
from tests.tiny import KERNEL_DEVICE

triton_matvec = pytest.importorskip("sparse_expansion.algorithms.kernels.triton_matvec")
triton_unpack = pytest.importorskip("sparse_expansion.algorithms.kernels.triton_unpack")

HOST_READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__")


@pytest.fixture(scope="module")
def one_block(tmp_path_factory, tokenizer):
    """A Llama with one block: the interpreter is slow."""
    folder = tmp_path_factory.mktemp("kernels") / "dense"
    return tiny.save_random("llama", folder, tokenizer, num_hidden_layers=1)


@pytest.fixture(scope="module")
def llama(one_block, text_folder):
    return expand(one_block, text_folder, one_block.parent / "m")


@pytest.fixture(scope="module")
def quantized(one_block, text_folder):
    return expand(one_block, text_folder, one_block.parent / "q", "--quantize", "--sparsity", "2:4")


@pytest.fixture
def on_kernels(monkeypatch):
    """Counts products of the kernels, which are taken wherever the model is."""
    calls = []
    multiply, dense = stored_experts.StoredExperts.multiply, expert_group.multiply_dense

    def few(self, X_TD, experts_T):
        calls.append(("stored", self.num_linears, len(X_TD)))
        return multiply(self, X_TD, experts_T)

    def many(X_TD, W_EOD, *others, **settings):
        calls.append(("unpacked", len(W_EOD), len(X_TD)))
        return dense(X_TD, W_EOD, *others, **settings)

    if KERNEL_DEVICE == "cpu":
        # The interpreter takes milliseconds for a program, however many rows it has.
        tile = {"ROWS": 256, "num_warps": 1}
        monkeypatch.setattr(triton_matvec, "tile_of", lambda form, tokens, has_codes: tile)
        monkeypatch.setattr(triton_unpack, "ROWS", 256)
        monkeypatch.setattr(triton_unpack, "COUNT_ROWS", 256)
    monkeypatch.setattr(expert_group, "have_kernels", lambda device: True)
    monkeypatch.setattr(stored_experts.StoredExperts, "multiply", few)
    monkeypatch.setattr(expert_group, "multiply_dense", many)
    return calls


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings).to(KERNEL_DEVICE)


def tokens(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 500, (1, count), generator=generator).to(KERNEL_DEVICE)


@pytest.mark.parametrize("kind", ["llama", "quantized", "expanded"])
@pytest.mark.parametrize("count", [1, 17])
def test_kernels_give_what_the_host_gives(kind, count, request):
    model = load(request.getfixturevalue(kind))
    ids = tokens(count)
    wanted = logits(model, ids)
    calls = request.getfixturevalue("on_kernels")
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-3, atol=1e-4)
    assert {name for name, *_ in calls} == {"stored" if count <= 16 else "unpacked"}


def test_gate_and_up_are_one_launch(llama, on_kernels):
    model = load(llama)
    logits(model, tokens(2))
    # Two linears together, and one by itself.
    assert on_kernels == [("stored", 2, 2), ("stored", 1, 2)]
    mlp = model.model.layers[0].mlp
    X = torch.randn(2, mlp.gate_proj.in_features, device=KERNEL_DEVICE)
    on_kernels.clear()
    with torch.no_grad():
        up, gate = mlp.up_proj(X), mlp.gate_proj(X)
        assert on_kernels == [("stored", 2, 2)]
        # Outputs are handed out once, and not for an input that was changed since.
        assert torch.equal(mlp.up_proj(X), up)
        X += 1
        assert not torch.equal(mlp.gate_proj(X), gate)


@pytest.mark.parametrize("count", [1, 17])
def test_a_forward_does_not_stop_at_the_host(llama, on_kernels, count):
    """On a GPU PyTorch itself tells; elsewhere whatever reads a tensor's numbers is caught."""
    model, ids = load(llama), tokens(count)
    logits(model, ids)
    if KERNEL_DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits(model, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return

    def guarded(name):
        read = getattr(torch.Tensor, name)

        def checked(self, *arguments, **settings):
            frame, files = sys._getframe(1), []
            while frame is not None:
                files.append(frame.f_code.co_filename)
                frame = frame.f_back
            # The interpreter reads what a kernel gets; and what is not of the model may read.
            is_ours = any("/sparse_expansion/" in file for file in files)
            if is_ours and not any(file.endswith("interpreter.py") for file in files):
                raise AssertionError(f"a tensor is read by {name}")
            return read(self, *arguments, **settings)

        return checked

    linear, X = expanded_linears(model)[0], torch.randn(3, 32)
    with pytest.MonkeyPatch.context() as patch:
        for name in HOST_READS:
            patch.setattr(torch.Tensor, name, guarded(name))
        patch.setattr(torch, "bincount", None)
        logits(model, ids)
        # The path of a CPU does read: the net is not full of holes.
        patch.setattr(expert_group, "have_kernels", lambda device: False)
        with pytest.raises((AssertionError, TypeError)), torch.no_grad():
            linear(X)


def test_tables_follow_weights_that_change(llama, on_kernels):
    model, ids = load(llama), tokens(3)
    first = logits(model, ids)
    other = load(llama)
    with torch.no_grad():
        for linear in expanded_linears(model):
            for expert in linear.experts:
                expert.values.mul_(2)
    changed = logits(model, ids)
    assert not torch.equal(changed, first)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(logits(model, ids), first)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(logits(model, ids), first)
    assert torch.equal(logits(copy.deepcopy(model), ids), first)


def test_a_bound_of_memory_unpacks_experts_in_pieces(llama, on_kernels):
    model, ids = load(llama), tokens(40)
    whole = logits(model, ids)
    assert {count for _, count, _ in on_kernels} == {3}
    linear = expanded_linears(model)[0]
    model.expert_cache.max_bytes = 2 * linear.in_features * linear.out_features * 4
    on_kernels.clear()
    torch.testing.assert_close(logits(model, ids), whole, rtol=1e-5, atol=1e-5)
    assert {count for _, count, _ in on_kernels} == {2, 1}
    assert model.expert_cache.num_bytes == 0
    # Without a bound they stay.
    model.expert_cache.max_bytes = None
    torch.testing.assert_close(logits(model, ids), whole, rtol=1e-5, atol=1e-5)
    assert model.expert_cache.num_bytes == sum(
        3 * one.in_features * one.out_features * 4 for one in expanded_linears(model)
    )


def test_single_experts_are_unpacked_by_the_kernel(quantized, monkeypatch):
    linear = expanded_linears(load(quantized))[0]
    wanted = linear.unpack(1, torch.float32)
    unpacked = []
    unpack = stored_experts.StoredExperts.unpack
    monkeypatch.setattr(
        stored_experts.StoredExperts,
        "unpack",
        lambda *given: unpacked.append(True) or unpack(*given),
    )
    monkeypatch.setattr(expansion, "have_kernels", lambda device: True)
    assert torch.equal(linear.unpack(1, torch.float32), wanted) and unpacked


def test_a_model_that_is_moved_leaves_no_tables(llama, on_kernels):
    model = load(llama)
    logits(model, tokens(2))
    groups = {id(linear.group): linear.group for linear in expanded_linears(model)}.values()
    assert len(groups) == 2 and all(group.num_tables == 1 for group in groups)
    model.to(torch.bfloat16)
    assert all(group.num_tables == 0 for group in groups)


def test_autocast_multiplies_in_its_dtype(llama, on_kernels):
    linear = expanded_linears(load(llama))[0]
    X = torch.randn(3, linear.in_features, device=KERNEL_DEVICE)
    with torch.no_grad(), torch.autocast(KERNEL_DEVICE, dtype=torch.bfloat16):
        assert linear(X).dtype == torch.bfloat16
    assert linear(X).dtype == torch.float32
    assert len(on_kernels) == 2


def test_gradients_take_the_path_that_has_them(llama, on_kernels):
    linear = expanded_linears(load(llama))[0]
    X = torch.randn(3, linear.in_features, device=KERNEL_DEVICE, requires_grad=True)
    linear(X).sum().backward()
    assert X.grad is not None and bool(X.grad.any()) and not on_kernels


@pytest.mark.parametrize(("kind", "has_kernels"), [("llama", True), ("expanded", False)])
def test_a_model_is_compiled_as_one_graph(kind, has_kernels, request):
    model = load(request.getfixturevalue(kind))
    if has_kernels:
        request.getfixturevalue("on_kernels")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for count in (1, 5):
        ids = tokens(count)
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids))


def test_generate_with_a_static_cache_is_compiled(llama, monkeypatch):
    model, ids = load(llama), tokens(4)
    settings = {"max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **settings)
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    # Outside of GPUs transformers compiles when it is made to.
    compile_config._compile_all_devices = True
    compiled = []
    get = type(model).get_compiled_call
    monkeypatch.setattr(
        type(model), "get_compiled_call", lambda *args: compiled.append(True) or get(*args)
    )
    found = model.generate(
        ids, **settings, cache_implementation="static", compile_config=compile_config
    )
    assert torch.equal(found, wanted) and compiled
