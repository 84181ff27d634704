"""How far two processes and one are apart with an int8 bank, over many random models, and whether its codes are why.
From the root of the repository:

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests/model/parallel python tests/model/parallel/int8_rounding.py --seeds 40
"""

import argparse
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from split_streams import SEEDS, make_model, make_streamer, run

from memflow_ops.model.parallel.ranks import Ranks

CASES_OF_INT8 = ("int8", "int8, bounded")


def work(rank: int, folder: str, seeds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    ranks, rows = Ranks(dist.group.WORLD, torch.device("cpu")), []
    for seed in range(seeds):
        for case in CASES_OF_INT8:
            SEEDS[case] = seed
            model = make_model(case)
            split = run(make_streamer(model, case, ranks))
            if rank == 0:
                alone, exact = run(make_streamer(model, case)), run(make_streamer(model, case, bank_dtype=None))
                given = run(make_streamer(model, case), codes=split["codes"])
                pairs = zip(split["codes"][-1]["codes"], alone["codes"][-1]["codes"], strict=True)
                moved = torch.cat([(a.int() - b.int()).abs().flatten() for a, b in pairs])
                apart = [(one["frames"] - split["frames"]).abs().max().item() for one in (alone, given, exact)]
                rows.append((*apart, int((moved > 0).sum()), int(moved.max()), moved.numel()))
                if rows[-1][3]:
                    print(f"{case}, seed {seed}: " + "{:.1e} apart, {:.1e} with the codes".format(*apart), rows[-1][3:])
    if rows:
        alone, given, exact, moved, most, count = zip(*rows, strict=True)
        print(
            f"{len(rows)} streams, {sum(map(bool, moved))} of them with codes that differ: {max(moved)} of {max(count)}"
        )
        print(f"at most, by {max(most)}. Latents of one process and of two differ by {max(alone):.1e} at most, by")
        print(
            f"{max(given):.1e} where they have the same codes, and by {min(exact):.1e} to {max(exact):.1e} from those"
        )
        print("of an exact bank.")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=40)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (folder, parser.parse_args().seeds), nprocs=2, start_method="spawn")
