"""The schedule of training: held-out seeds, and stages of any length."""

import pytest

from memflow_ops.model.toy.schedule import (
    HELD_OUT_SEED,
    STAGES,
    TOTAL_STEPS,
    TrainingSettings,
    scaled_stages,
)


@pytest.mark.parametrize("seed", [-1, HELD_OUT_SEED, 123_456])
def test_held_out_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="held out for evaluation"):
        TrainingSettings(seed=seed)


def test_stages_scale_to_any_number_of_steps():
    stages = scaled_stages(STAGES, TOTAL_STEPS)
    assert stages == STAGES
    assert sum(stage.steps for stage in scaled_stages(STAGES, 1001)) == 1001
    assert sum(stage.steps for stage in scaled_stages(STAGES, 1)) == 1
    with pytest.raises(ValueError, match="at least 1"):
        scaled_stages(STAGES, 0)
