"""What crosses between a device and the host in a run, on a pretended device."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sparse_expansion.algorithms import decide, selection
from sparse_expansion.config import RefinementConfig, RunConfig
from sparse_expansion.data.activations import ActivationBuffers
from sparse_expansion.model.sources import resolve_name
from sparse_expansion.work import hardware, worker
from sparse_expansion.work.context import WorkContext
from sparse_expansion.work.spec import WorkerSpec, bound_device_memory, resident_bytes
from sparse_expansion.work.stages import make as make_stages
from sparse_expansion.work.stages.score import evaluate
from tests.card import DEVICE, OnCard, card_in_use
from tests.tiny import digests
from tests.work.making import make

PLENTY = 1 << 30
SEQLEN, HIDDEN, MLP = 32, 32, 72
TOKENS_OF_SHARD = 2 * SEQLEN
FEW_NUMBERS = 24
"""Bytes of one number for every expert: what a marker says of them."""


@pytest.fixture
def card(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a pretended card stands in for a real one, and there is one")
    # Triton's kernels want the memory of a real one; these are PyTorch's.
    monkeypatch.setattr(selection, "triton_smallest", lambda: None)
    monkeypatch.setattr(decide, "triton_decide", lambda: None)
    for module in (hardware, worker):
        monkeypatch.setattr(module, "device_name", lambda device: "a pretended card")
        monkeypatch.setattr(module, "device_peak_memory_bytes", lambda device: 0)
    with card_in_use() as card:
        yield card


def run_on(card, folder, text, output, *, device_bytes=PLENTY, **given):
    card.up.clear()
    card.down.clear()
    found = {"device": DEVICE, "device_bytes": device_bytes, **given.pop("worker", {})}
    return make(folder, text, output, clusters=3, worker=found, **given)[0]


def written_bytes(store):
    """Bytes of all tensors that units made, but for the trunk's, which never was on the card."""
    return sum(
        tensor["bytes"]
        for key, record in store.records().items()
        for file in record["files"].values()
        for tensor in file["tensors"].values()
        if key != "trunk"
    )


def model_bytes(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("schedule", ["compressed", "sequential", "cumulative", "dense"])
def test_only_files_come_down_and_only_weights_go_up(
    schedule, card, tmp_path, llama_folder, text_folder
):
    """Of hidden states, captured inputs, samples, rows, sums and experts nothing crosses."""
    store = run_on(card, llama_folder, text_folder, tmp_path / "o", schedule=schedule)
    assert sum(size for size in card.down if size > FEW_NUMBERS) == written_bytes(store)
    # Weights once, but that a pretended card ties no head; window ids and positions every time.
    weights = model_bytes(llama_folder) + 512 * HIDDEN * 4
    assert sum(card.up) < weights + 20 * 8 * SEQLEN * 8
    activations = {4 * TOKENS_OF_SHARD * width for width in (HIDDEN, MLP)}
    assert not activations & set(card.up)


@pytest.mark.parametrize(("schedule", "finetune"), [("sequential", 0), ("compressed", 1)])
def test_any_budget_gives_the_same_bytes(
    schedule, finetune, card, tmp_path, llama_folder, text_folder
):
    """What is over it goes to the host and to scratch files, and comes back."""
    found, crossings = [], []
    for number, (on_card, on_host) in enumerate([(PLENTY, PLENTY), (150_000, 20_000), (0, PLENTY)]):
        output = tmp_path / str(number)
        run_on(
            card,
            llama_folder,
            text_folder,
            output,
            schedule=schedule,
            refinement=RefinementConfig(finetune=finetune),
            device_bytes=on_card,
            worker={"activation_bytes": on_host, "scratch": str(tmp_path)},
        )
        found.append(digests(output))
        crossings.append(sum(card.down) + sum(card.up))
    assert all(one == found[0] for one in found)
    assert crossings[0] < crossings[1] < crossings[2]
    assert not list(Path(tmp_path).glob("sparse-expansion-*"))


@pytest.mark.parametrize("model", ["dense", "expanded"])
def test_hidden_states_of_an_evaluation_stay(model, card, tmp_path, llama_folder, text_folder):
    store = run_on(card, llama_folder, text_folder, tmp_path / "o")
    source = resolve_name(str(llama_folder))
    tokens = torch.randint(0, 512, (3, 16)).tolist()
    losses = []
    for given in ({"device": DEVICE, "device_bytes": PLENTY}, {"device": "cpu"}):
        context = WorkContext(WorkerSpec(store=store.root, source=source, threads=1, **given))
        context.use(RunConfig())
        card.down.clear()
        done = evaluate.function(context, model=model, tokens=tokens, layers=(0, 2))
        losses.append(done.stats["nll"])
    assert all(size <= FEW_NUMBERS for size in card.down)
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_what_is_held_counts_until_it_is_gone(card):
    buffers = ActivationBuffers(memory_bytes=100, device=DEVICE, device_bytes=256)
    first = buffers.hold(torch.ones(32, device=DEVICE))
    assert isinstance(first, OnCard) and buffers.hold(first) is first
    captured = buffers.allocate((4, 4), torch.float32)
    assert isinstance(captured, OnCard) and buffers.bytes_on_device == 192
    over = buffers.hold(torch.full((32,), 3.0, device=DEVICE))
    assert not isinstance(over, OnCard) and over.tolist() == [3.0] * 32
    assert not isinstance(buffers.empty((32,), torch.float32), OnCard)
    assert not isinstance(buffers.allocate((5, 5), torch.float32), OnCard)
    assert (buffers.bytes_on_device, buffers.bytes_in_memory) == (192, 100)
    buffers.release(captured)
    del first, captured
    assert buffers.bytes_on_device == 0
    assert isinstance(buffers.empty((64,), torch.float32), OnCard)


def test_a_host_tensor_is_held_as_it_is():
    buffers = ActivationBuffers(memory_bytes=100)
    values = torch.ones(1000)
    assert buffers.hold(values) is values and buffers.bytes_on_device == 0


def test_a_unit_without_room_on_the_device_is_tried_again_with_less_kept(
    card, tmp_path, llama_folder, text_folder, monkeypatch
):
    """Residents make way for a unit's arrays; only what does not fit alone is an error."""
    whole = digests(Path(run_on(card, llama_folder, text_folder, tmp_path / "a").root))
    compress, seen = make_stages.compress_by_share, []

    def narrow(*args, **given):
        seen.append(1)
        if len(seen) in (2, 5):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compress(*args, **given)

    monkeypatch.setattr(make_stages, "compress_by_share", narrow)
    assert digests(Path(run_on(card, llama_folder, text_folder, tmp_path / "b").root)) == whole
    monkeypatch.setattr(make_stages, "compress_by_share", lambda *args, **given: narrow_always())
    with pytest.raises(ValueError, match="layer-000/.*experts.*out of device memory"):
        run_on(card, llama_folder, text_folder, tmp_path / "c")


def narrow_always():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_budgets_of_workers_that_share_a_card(monkeypatch):
    """Half of what is free, and half of the share: whichever is less; allocations end there."""
    free = {"cuda": 70 * 10**9, "cuda:1": 10 * 10**9}
    bounds = {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, device: bounds.__setitem__(device, share),
    )

    def spec(**given):
        return WorkerSpec(store="", source=None, **given)

    assert resident_bytes(spec(), "cpu") == 0
    assert resident_bytes(spec(), "cuda") == 35 * 10**9
    assert resident_bytes(spec(device_share=0.25), "cuda") == 10 * 10**9
    assert resident_bytes(spec(device_share=0.25), "cuda:1") == 5 * 10**9
    assert resident_bytes(spec(device_share=0.25, device_bytes=7), "cuda:1") == 7
    bound_device_memory(spec(), "cuda")
    bound_device_memory(spec(device_share=0.5), "cpu")
    assert not bounds
    for device in ("cuda", "cuda:1"):
        bound_device_memory(spec(device_share=0.5), device)
    assert bounds == {number: pytest.approx(0.5 - (600 << 20) / 80e9) for number in (0, 1)}
