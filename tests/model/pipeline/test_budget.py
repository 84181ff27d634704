"""The arithmetic of memory: what is printed adds up, what cannot fit is refused with what would."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memflow_ops.cache.chosen import ChosenBlocks, choice_bytes
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.store import HistoryFolder
from memflow_ops.model.pipeline.budget import Disk, FreeMemory, Item, fit_history, size
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

CONFIG = ModelConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=3, in_dim=4, out_dim=4, text_dim=8, text_len=6)
MODEL = CausalVideoModel(CONFIG).bfloat16()
SETTINGS = StreamSettings(
    height=8, width=12, window_frames=9, bank_frames=5, device_frames=64, block_size=10, query_group=16
)
FRAME = 3 * (2 * 24 + 3) * 2 * 12 * 2  # layers x (keys and values of 24 tokens, 3 blocks) x heads x head_dim x bytes
MEAN = 3 * 2 * 12 * 2
OTHER = 1000
MINIMUM = 9 + 3 + (5 + 2)  # window, sink, the bank and the prototypes of the window's other chunks


def plan(free, *, prototypes=40, host_free=10**9, history_frames=None, **changes):
    memory = FreeMemory(torch.device("cpu"), free, host_free)
    settings, items = replace(SETTINGS, **changes), [Item("the rest", OTHER)]
    return fit_history(settings, lambda s: s.cache_layout(MODEL, 1), prototypes, items, memory, history_frames)


def enough(device_frames, means):
    return (9 + 3 + device_frames) * FRAME + means * MEAN + OTHER


def test_all_on_the_device_where_it_fits():
    budget = plan(enough(40, 40))
    assert (budget.settings.device_frames, budget.settings.host_frames) == (40, 0)
    assert budget.device_bytes == enough(40, 40)
    cache = FrameCache(budget.layout)
    held = [t for t in vars(cache).values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    assert sum(t.nbytes for t in held) - budget.layout.means_bytes // 40 == budget.device_bytes - OTHER  # one is staged


@pytest.mark.parametrize("device_frames", [7, 8, 23, 39])
def test_the_rest_waits_in_host_memory(device_frames):
    for spare in (0, FRAME - 1):
        budget = plan(enough(device_frames, 40) + spare)
        assert (budget.settings.device_frames, budget.settings.host_frames) == (device_frames, 40 - device_frames)
        assert budget.device_bytes <= budget.free.bytes
        assert budget.host_bytes == (40 - device_frames + 1) * FRAME


def test_short_stories_take_no_more_than_they_leave_behind():
    budget = plan(10**9, prototypes=3)
    assert (budget.settings.bank_frames, budget.settings.device_frames) == (3, 5)
    assert plan(10**9, prototypes=0, bank_frames=60).settings.bank_frames == 1


def test_copies_of_the_chosen_blocks_are_counted_where_one_selection_serves_the_chunk():
    copies = 2  # of 4 blocks of 10 tokens, in frames of 24
    budget = plan(enough(40 + copies, 40), query_group=None, top_k=4)
    assert budget.layout.copied_frames == copies and budget.settings.device_frames == 40
    assert Item("copies of the chosen blocks, 2 frames", copies * FRAME) in budget.cache_items
    assert budget.device_bytes == enough(40 + copies, 40)
    assert plan(10**9, query_group=128, top_k=4).layout.copied_frames == copies, "a chunk of 72 queries is one group"
    assert plan(enough(40, 40), query_group=71, top_k=4).layout.copied_frames == 0
    kept = ChosenBlocks(budget.layout, 4, None)
    assert kept.indices.nbytes == choice_bytes(budget.layout, 4, None)
    assert kept.copied_tokens == 40


@pytest.mark.parametrize("score", ["mean", "moments"])
def test_an_int8_bank_holds_nearly_twice_as_many_frames(score):
    """At the size of Wan 2.1 1.3B in bfloat16, by the plan: what more memory brings, of the device and of the host."""
    sizes = dict(bank_frames=5, score=score, dtype=torch.bfloat16)

    def fits(gib, host_gib, bank_dtype):
        def layout_of(s):
            held = dict(device_frames=s.device_frames, host_frames=s.host_frames)
            return CacheLayout(30, 1, 1560, 12, 128, window_frames=9, **held, **sizes, bank_dtype=s.bank_dtype)

        free = FreeMemory(torch.device("cpu"), gib << 30, host_gib << 30)
        settings = replace(SETTINGS, bank_dtype=bank_dtype)
        with pytest.raises(ValueError, match=r"lower --history-frames to (\d+)") as refused:
            fit_history(settings, layout_of, 2000, [], free)
        fit = int(str(refused.value).split("--history-frames to ")[1].split()[0])
        return fit_history(settings, layout_of, 2000, [], free, fit)

    frames = {kind: [fits(gib, host, kind) for gib, host in ((40, 0), (60, 0), (60, 20))] for kind in (None, "int8")}
    held = {kind: [b.settings.device_frames + b.settings.host_frames for b in of] for kind, of in frames.items()}
    for more in (1, 2):  # 20 GiB more on the device, and on the host
        ratio = (held["int8"][more] - held["int8"][more - 1]) / (held[None][more] - held[None][more - 1])
        assert ratio > 1.9, ratio
    text = "\n".join(frames["int8"][2].lines())
    assert "one kept frame" in text and "as int8 with scales: 1.9" in text
    assert "kept frame" not in "\n".join(frames[None][2].lines())


def test_an_int8_plan_counts_what_is_allocated():
    budget = plan(10**9, bank_dtype="int8")
    cache = FrameCache(budget.layout)
    held = [cache._keys, cache._values, cache._descriptors, *cache._bank, cache._means]
    assert sum(t.nbytes for t in held) == budget.device_bytes - OTHER
    assert sum(item.size for item in budget.cache_items) == budget.device_bytes - OTHER


def test_lines_add_up():
    lines = plan(enough(20, 40)).lines()
    text = "\n".join(lines)
    assert "3 layers x 1 story x (2 x 24 tokens + 3 blocks) x 2 heads x 12 x 2 bytes" in text
    assert f"one frame {size(FRAME)}" in " ".join(text.split())
    assert "local window, 9 frames" in text and "sink, 3 frames" in text
    assert "history, 20 frames, 5 of them as the bank" in text and "history, 20 frames more" in text
    assert size(enough(20, 40)) in text


@pytest.mark.parametrize("memory, frames", [("none", 9), ("sink", 12)])
def test_kinds_without_history(memory, frames):
    budget = plan(frames * FRAME + OTHER, memory=memory)
    assert budget.device_bytes == frames * FRAME + OTHER and not budget.host_bytes
    with pytest.raises(ValueError, match="--height and --width"):
        plan(frames * FRAME + OTHER - 1, memory=memory)


def test_full_needs_it_all_on_the_device():
    assert plan(enough(40, 40), memory="full").settings.device_frames == 40
    with pytest.raises(ValueError, match=r"Lower --frames-per-prompt .* or use --memory memflow"):
        plan(enough(40, 40) - 1, memory="full")
    with pytest.raises(ValueError, match="attends to all 40 frames"):
        plan(10**9, memory="full", history_frames=36)


def test_refusal_names_a_bank_that_fits():
    free = enough(7, 40) - 2 * FRAME
    with pytest.raises(ValueError, match="Lower --bank-frames to 3") as refused:
        plan(free)
    for word in (size(enough(7, 40)), size(free), "local window, 9 frames", "the rest", size(FRAME)):
        assert word in str(refused.value)
    assert plan(free, bank_frames=3).device_bytes <= free
    with pytest.raises(ValueError, match="--height and --width"):
        plan(enough(2, 40), bank_frames=1)


def test_refusal_names_a_history_that_fits():
    for host_free in (0, 5 * FRAME, 20 * FRAME):
        with pytest.raises(ValueError, match=r"lower --history-frames to (\d+)") as refused:
            plan(enough(10, 40), host_free=host_free)
        fits = int(str(refused.value).split("--history-frames to ")[1].split()[0])
        assert fits == 10 + max(0, host_free // FRAME - 1)
        budget = plan(enough(10, 40), host_free=host_free, history_frames=fits)
        assert budget.host_bytes <= host_free


def test_a_cpu_is_its_own_host():
    with pytest.raises(ValueError, match="--history-frames to 10"):
        plan(enough(10, 40), host_free=None)


def test_processes_of_a_machine_divide_what_the_host_has():
    """A CUDA device is of one process; a CPU's memory is the host's."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert FreeMemory(cuda, 90, 70).shared_by(3) == FreeMemory(cuda, 90, 23)
    assert FreeMemory(cpu, 90, None).shared_by(4) == FreeMemory(cpu, 22, None)


@pytest.mark.parametrize(
    "count, words", [(0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.5 KiB"), (2**41, "2,048.0 GiB")]
)
def test_sizes_in_words(count, words):
    assert size(count) == words


# ----------------------------------------------------------------------------------------------------------------- disk


def with_disk(free, *, host_free=None, prototypes=40, disk_free=10**9, device=None, host=None, **changes):
    disk = Disk(Path("history"), disk_free, device, host, changes.pop("divided", None))
    memory = FreeMemory(torch.device("cpu"), free, host_free)
    settings, items = replace(SETTINGS, **changes), [Item("the rest", OTHER)]
    return fit_history(settings, lambda s: s.cache_layout(MODEL, 1), prototypes, items, memory, None, disk)


ON_THE_WAY = (2 + 5 + 1) * 4096 * -(-(FRAME + MEAN) // 4096)


def tiers(budget):
    return budget.settings.device_frames, budget.settings.host_frames, budget.settings.disk_frames


@pytest.mark.parametrize("host_free", [None, 10**9, ON_THE_WAY + 4 * FRAME, ON_THE_WAY])
def test_what_fits_nowhere_else_is_on_disk_alone(host_free):
    budget = with_disk(enough(12, 40) + ON_THE_WAY, host_free=host_free)
    on_device, in_host, on_disk = tiers(budget)
    assert on_device + in_host + on_disk == 40 and budget.device_bytes <= budget.free.bytes
    if host_free is None:  # device and host are one
        assert on_device == 12 and in_host == 0
        assert budget.device_bytes + budget.host_bytes <= budget.free.bytes
    else:
        assert on_device >= 12 and in_host == min(40 - on_device, max(0, (host_free - ON_THE_WAY) // FRAME - 1))
        assert budget.host_bytes <= host_free
    assert tiers(with_disk(10**9, host_free=10**9, device=9, host=2)) == (9, 2, 29)
    assert tiers(with_disk(10**9, host_free=10**9, divided=(8, 3, 29))) == (8, 3, 29)
    assert tiers(with_disk(10**9, host_free=10**9, divided=(8, 3, 29), device=8, host=3)) == (8, 3, 29)
    for fewer in ({"device": 7}, {"host": 2}):
        with pytest.raises(ValueError, match="8 past frames on the device and 3 in host memory, and goes on only with"):
            with_disk(10**9, host_free=10**9, divided=(8, 3, 29), **fewer)


def test_the_plan_counts_all_three_tiers(tmp_path):
    budget = with_disk(10**9, host_free=10**9, device=9, host=2)
    text = "\n".join(budget.lines())
    assert "history, 9 frames, 5 of them as the bank" in text and "history, 2 frames more" in text
    assert "all of 40 frames, 29 of them there alone, and snapshots" in text and "to and from the disk" in text
    record = budget.disk.needed(budget.layout, 1) - budget.disk.needed(budget.layout, 0)
    assert record % 4096 == 0 and record >= FRAME + MEAN
    assert size(budget.disk.needed(budget.layout, 40)) in text
    cache = FrameCache(budget.layout, history=HistoryFolder(tmp_path))
    assert cache._stores[0].layout.record_bytes == record


def test_a_disk_that_is_too_small_is_refused():
    needed = with_disk(10**9).disk.needed(with_disk(10**9).layout, 40)
    assert with_disk(10**9, disk_free=needed)
    with pytest.raises(ValueError, match=r"a history of 40 frames needs .* in history, where"):
        with_disk(10**9, disk_free=needed - 1)
    with pytest.raises(ValueError, match="lower --bank-frames or --host-frames"):
        with_disk(10**9, host_free=ON_THE_WAY - 1)
