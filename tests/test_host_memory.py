"""How much memory the host can give: control groups of both versions, in made-up trees."""

from pathlib import Path

import pytest

from memflow_ops.host_memory import free_host_bytes

MIB = 2**20
V2 = "36 25 0:31 {inside} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "37 25 0:32 {inside} {point} rw,nosuid - cgroup cgroup rw,memory"
OTHER = "38 25 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"


class Host:
    """A made-up host with 1000 MiB of available memory."""

    def __init__(self, root: Path, mounts: list[str], own: list[str]):
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {2000 * 1024} kB\nMemAvailable: {1000 * 1024} kB\n")
        self.write("proc/self/mountinfo", "".join(f"{line}\n" for line in mounts))
        self.write("proc/self/cgroup", "".join(f"{line}\n" for line in own))

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def group(self, path: str, used: int, limit: int | None, high: int | None = None, cache: int = 0) -> None:
        """A group of version 2; its numbers are in MiB, and a limit of None is none."""
        for name, number in (("memory.max", limit), ("memory.high", high)):
            self.write(f"{path}/{name}", "max\n" if number is None else f"{number * MIB}\n")
        self.write(f"{path}/memory.current", f"{used * MIB}\n")
        self.write(f"{path}/memory.stat", f"anon 5\ninactive_file {cache * MIB}\n")

    def group_1(self, path: str, used: int, limit: int | None, cache: int = 0) -> None:
        """A group of version 1; without a limit it states a number that no memory has."""
        self.write(f"{path}/memory.limit_in_bytes", f"{2**63 - 4096 if limit is None else limit * MIB}\n")
        self.write(f"{path}/memory.usage_in_bytes", f"{used * MIB}\n")
        self.write(f"{path}/memory.stat", f"inactive_file 7\ntotal_inactive_file {cache * MIB}\n")

    @property
    def free(self) -> float:
        return free_host_bytes(self.root) / MIB


def version_2(root: Path, own: str = "/user.slice/job", inside: str = "/", point: str = "/sys/fs/cgroup") -> Host:
    return Host(root, [V2.format(inside=inside, point=point)], [f"0::{own}"])


def test_without_groups_it_is_what_is_available(tmp_path):
    host = version_2(tmp_path)
    assert host.free == 1000
    for name in ("cgroup", "mountinfo"):
        (tmp_path / "proc/self" / name).unlink()
        assert host.free == 1000


@pytest.mark.parametrize("limited", ["", "/user.slice", "/user.slice/job"])
def test_the_limit_of_the_own_group_or_of_any_above_it_counts(tmp_path, limited):
    host = version_2(tmp_path)
    for path in ("", "/user.slice", "/user.slice/job"):
        limits = {"limit": 300, "cache": 20} if path == limited else {"limit": None}
        host.group(f"sys/fs/cgroup{path}", used=100, **limits)
    host.group("sys/fs/cgroup/user.slice/another", used=9, limit=10)
    assert host.free == 300 - 100 + 20


def test_the_smallest_of_several_limits_counts(tmp_path):
    host = version_2(tmp_path)
    host.group("sys/fs/cgroup/user.slice/job", used=10, limit=500, high=400)
    assert host.free == 390
    host.group("sys/fs/cgroup/user.slice", used=300, limit=600)
    assert host.free == 300
    host.group("sys/fs/cgroup/user.slice", used=700, limit=600)
    assert host.free == 0


@pytest.mark.parametrize("inside, own", [("/", "/"), ("/docker/1", "/docker/1"), ("/docker/1", "/"), ("/", "/../..")])
def test_in_a_container_the_mount_is_the_group(tmp_path, inside, own):
    host = version_2(tmp_path, own=own, inside=inside)
    host.group("sys/fs/cgroup", used=100, limit=250)
    assert host.free == 150


def test_a_group_below_that_of_the_container(tmp_path):
    host = version_2(tmp_path, own="/docker/1/job", inside="/docker/1", point="/sys/fs/my\\040groups")
    host.group("sys/fs/my groups/job", used=100, limit=180)
    assert host.free == 80


@pytest.mark.parametrize("limited", ["", "/slurm", "/slurm/job_3"])
def test_version_1(tmp_path, limited):
    mounts = [OTHER, V1.format(inside="/", point="/sys/fs/cgroup/memory")]
    host = Host(tmp_path, mounts, ["5:cpu,cpuacct:/elsewhere", "4:memory:/slurm/job_3", "1:name=systemd:/x"])
    for path in ("", "/slurm", "/slurm/job_3"):
        limits = {"limit": 300, "cache": 50} if path == limited else {"limit": None}
        host.group_1(f"sys/fs/cgroup/memory{path}", used=100, **limits)
    assert host.free == 250


def test_both_versions_at_once(tmp_path):
    """As systemd's hybrid setup has them: memory is of version 1, and version 2 has no controllers."""
    mounts = [
        V2.format(inside="/", point="/sys/fs/cgroup/unified"),
        V1.format(inside="/", point="/sys/fs/cgroup/memory"),
    ]
    host = Host(tmp_path, mounts, ["4:memory:/job", "0::/job"])
    host.group_1("sys/fs/cgroup/memory/job", used=100, limit=400)
    (tmp_path / "sys/fs/cgroup/unified/job").mkdir(parents=True)
    assert host.free == 300


def test_here_it_is_a_number():
    assert 2**20 < free_host_bytes() < 2**50
