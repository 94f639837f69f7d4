"""What people do with a model in PyTorch and its libraries beside calling it.

Pickles are made and read here of the tests' own models alone, as Ray and ``torch.save`` make them;
the package itself reads none.
"""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import accelerate
import cloudpickle
import peft
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from sparse_expansion.algorithms import matvec
from sparse_expansion.model.routing import GroupRouter
from tests.model.running import expand, expanded_linears, logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory, llama_folder, text_folder):
    return expand(llama_folder, text_folder, tmp_path_factory.mktemp("uses") / "m")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, llama_folder, text_folder):
    folder = tmp_path_factory.mktemp("uses") / "q"
    return expand(llama_folder, text_folder, folder, "--quantize")


@pytest.fixture
def tokens():
    return torch.randint(1, 500, (2, 20), generator=torch.Generator().manual_seed(0))


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def test_autocast_rounds_as_it_does_in_the_dense_model(llama, tokens):
    model = load(llama)
    exact = logits(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = logits(model, tokens)
        linear = expanded_linears(model)[0]
        assert linear(torch.randn(3, linear.in_features)).dtype == torch.bfloat16
        assert linear(torch.randn(1, linear.in_features)).dtype == torch.bfloat16
    assert not torch.equal(rounded.float(), exact)
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.1)


def test_autocast_routes_as_without(llama):
    model = load(llama)
    for router in (m for m in model.modules() if isinstance(m, GroupRouter)):
        X = torch.randn(200, router.mean.shape[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            order = router(X.clone()).order_T
        assert torch.equal(order, router(X.clone()).order_T)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_that_ran_is_pickled_as_one_that_did_not(llama, tokens, mode):
    model = load(llama)
    size = len(pickle.dumps(model))
    with mode():
        wanted = model(tokens).logits.clone()
    assert model.expert_cache.num_bytes > 0
    stored = pickle.dumps(model)
    assert len(stored) < 1.05 * size
    assert len(cloudpickle.dumps(model)) < 1.05 * size
    file = io.BytesIO()
    torch.save(model, file)
    again = pickle.loads(stored)
    assert again.expert_cache.num_bytes == 0
    assert again.expert_cache.max_bytes == model.expert_cache.max_bytes
    assert torch.equal(logits(again, tokens), wanted)
    linears = expanded_linears(again)
    assert {id(linear.cache) for linear in linears} == {id(again.expert_cache)}


def test_a_copy_of_a_model_that_ran_is_a_model_of_its_own(quantized, tokens):
    model = load(quantized)
    wanted = logits(model, tokens)
    copied = copy.deepcopy(model)
    assert copied.expert_cache is not model.expert_cache and copied.expert_cache.num_bytes == 0
    assert torch.equal(logits(copied, tokens), wanted)
    with torch.no_grad():
        for linear in expanded_linears(copied):
            linear.grid.scale.zero_()
    assert not torch.equal(logits(copied, tokens), wanted)
    assert torch.equal(logits(model, tokens), wanted)


def test_float64_is_refused_in_a_line_that_says_what_is_supported(llama, tokens):
    with pytest.raises(ValueError, match="float32, bfloat16 or float16, and not in torch.float64"):
        load(llama, dtype=torch.float64)
    with pytest.raises(ValueError, match="and not in torch.float64"):
        logits(load(llama).double(), tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_leaves_routers_and_grids_in_float32(quantized, dtype, tokens):
    model = load(quantized)
    linear = expanded_linears(model)[0]
    centroids, scale = linear.group_router.centroids.clone(), linear.grid.scale.clone()
    model.to(dtype)
    assert linear.group_router.centroids.dtype == linear.grid.scale.dtype == torch.float32
    assert torch.equal(linear.group_router.centroids, centroids)
    assert torch.equal(linear.grid.scale, scale)
    assert model.model.norm.weight.dtype == dtype
    assert logits(model, tokens).dtype == dtype


def test_one_token_has_the_gradient_that_it_has_among_others(llama, monkeypatch):
    monkeypatch.setattr(matvec, "MIN_WEIGHTS", 1)
    linear = expanded_linears(load(llama))[0]
    X = torch.randn(2, linear.in_features, requires_grad=True)
    linear(X).sum().backward()
    one = X.detach()[:1].clone().requires_grad_(True)
    linear(one).sum().backward()
    torch.testing.assert_close(one.grad, X.grad[:1])


def test_training_after_inference_uses_what_inference_cached(llama, tokens):
    model = load(llama)
    with torch.inference_mode():
        model(tokens)
    model.model.embed_tokens.weight.requires_grad_(True)
    model(tokens, labels=tokens).loss.backward()
    assert bool(model.model.embed_tokens.weight.grad.abs().sum() > 0)


def test_a_model_without_a_head_gives_the_hidden_states(llama, tokens):
    base = AutoModel.from_pretrained(llama)
    wanted = load(llama).model(tokens).last_hidden_state
    assert len(expanded_linears(base)) == len(expanded_linears(load(llama))) > 0
    with torch.no_grad():
        assert torch.equal(base(tokens).last_hidden_state, wanted)


@pytest.mark.parametrize("form", ["sparse", "quantized"])
@pytest.mark.parametrize("way", ["disk", "host"])
def test_offloaded_blocks_are_loaded_when_they_are_called(form, way, request, tmp_path, tokens):
    folder = request.getfixturevalue("llama" if form == "sparse" else "quantized")
    wanted = logits(load(folder), tokens)
    if way == "disk":
        names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
        where = {name: "cpu" for name in [*names, "model.layers.0", "model.layers.2"]}
        where["model.layers.1"] = "disk"
        model = load(folder, device_map=where, offload_folder=str(tmp_path / "offload"))
    else:
        model = load(folder)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    held = [parameter.device.type for parameter in model.model.layers[1].parameters()]
    assert "meta" in held
    for _ in range(2):
        torch.testing.assert_close(logits(model, tokens), wanted, rtol=0, atol=1e-5)


def test_adapters_are_trained_on_an_expanded_model(llama, tokens, tmp_path):
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(llama), settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        report_to=[],
        use_cpu=True,
        max_steps=2,
        save_strategy="no",
        learning_rate=0.1,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in name for name in changed)


def test_threads_may_share_a_model(llama):
    model = load(llama)
    texts = [torch.randint(1, 500, (1, 5 + n)) for n in range(8)]
    wanted = [logits(model, text) for text in texts]
    # No room for two: every thread evicts what another has just put in.
    model.expert_cache.clear()
    model.expert_cache.max_bytes = 1
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda text: logits(model, text), texts))
            assert all(map(torch.equal, found, wanted))
    held = sum(size for _, size in model.expert_cache._forms.values())
    assert model.expert_cache.num_bytes == held


def test_an_expert_that_is_written_to_is_unpacked_again(llama, tokens):
    model = load(llama)
    before = logits(model, tokens)
    with torch.no_grad():
        for linear in expanded_linears(model):
            for expert in linear.experts:
                expert.values.mul_(2)
    assert not torch.equal(logits(model, tokens), before)
