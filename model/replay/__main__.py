"""`python -m memflow_ops.model.replay FIXTURE.safetensors FIXTURE.json`, see replay.py."""

import sys

from memflow_ops.model.replay.replay import main

sys.exit(main())
