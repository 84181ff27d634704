"""Our kernels alone, at a tiny size, on a GPU or in Triton's interpreter: every contender of every case is checked."""

import pytest
import torch

from memflow_ops.bench.cases import registry, tuning
from memflow_ops.bench.harness.contest import Contest
from memflow_ops.kernels import configs

CASES = [case for case in registry.registry() if case.group == "tiny-kernels"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.removeprefix("kernel/"))
@torch.no_grad()
def test_every_contender_is_right(case):
    found = Contest(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert len(found.built.contenders) >= 2
    assert any(contender.flops or contender.bytes for contender in found.built.contenders.values())


def test_a_gpu_runs_the_same_cases_at_full_size():
    def names(group: str) -> set[str]:
        return {case.name.split("/")[1] for case in registry.registry() if case.group == group}

    assert names("kernels") == names("tiny-kernels")
    full = [case for case in registry.registry() if case.group == "kernels"]
    assert all(case.devices == ("cuda",) and case.size.queries == 4680 for case in full)


def test_a_configuration_holds_for_the_calls_inside_and_no_longer():
    def planned() -> list[int]:
        tile, launch, _ = configs.attend_config(90, torch.bfloat16, 128, 128, 4680)
        return [tile["BLOCK_M"], tile["BLOCK_N"], launch["num_warps"], launch["num_stages"]]

    def split() -> int:
        return configs.splits_config(37 * 12, 24 * 64, 128, 132)[1]

    before, splits = planned(), split()
    with tuning.configured((128, 32, 8, 4), most_splits=1):
        assert planned() == [128, 32, 8, 4] and split() == 1
    assert planned() == before != [128, 32, 8, 4] and split() == splits > 1
    with tuning.configured(forward="gluon"):
        assert configs.hopper_config(90, torch.bfloat16, 128, 64) == (64, 4) and planned() == before
    assert configs.hopper_config(90, torch.bfloat16, 128, 64) is None


def test_without_triton_the_kernels_are_not_measured(monkeypatch):
    monkeypatch.setattr(registry, "implementations", lambda: {"triton": "triton is not installed"})
    with pytest.raises(ValueError, match=r"runs on cpu \(triton is not installed\)"):
        registry.chosen("cpu", ["tiny-kernels"])
    assert not any(case.needs_triton for case in registry.chosen("cpu", registry.GROUPS))
