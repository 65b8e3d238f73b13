"""How an engine is asked for GPUs, which runtime a task without any gets, and what it finds in its environment."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nodeservice.core.model import MIB
from nodeservice.errors import NodeFaultError
from nodeservice.ports import ContainerSpec, Mount
from nodeservice.runtime.cdi_specs import CdiDevices, read_cdi_specs
from nodeservice.runtime.docker_spec import create_body, driver_capabilities, environment
from nodeservice.runtime.engine_process import EngineProcess, has_program
from nodeservice.runtime.gpu_access import GpuAccess, GpuWay, choose_gpu_access, numbers
from nodeservice.runtime.libpod import libpod_body
from nodeservice.runtime.profile import EngineProfile, read_profile

A, B = "GPU-aaaaaaaa-0000-0000-0000-000000000000", "GPU-bbbbbbbb-0000-0000-0000-000000000000"
MIG = "MIG-cccccccc-0000-0000-0000-000000000000"
CDI_OF_A = f"nvidia.com/gpu={A}"
INFO: dict[str, Any] = {
    "Plugins": {"Log": ["local"]},
    "DefaultRuntime": "runc",
    "Runtimes": {"runc": {"path": "runc"}, "io.containerd.runc.v2": {"path": "runc"}},
}
NVIDIA_RUNTIME = {"path": "/usr/bin/nvidia-container-runtime"}
HOOK = EngineProcess(has_gpu_hook=True)
NO_HOOK = EngineProcess(has_gpu_hook=False)
SPEC = ContainerSpec(
    name="nodeservice.t.1", image="demo", argv=("work", "-x"), shell=None, env=(), labels={"nodeservice.spec": "x"},
    cpu_milli=500, memory_bytes=64 * MIB, pids_limit=10, mounts=(Mount(source=Path("/r"), target="/results"),),
    gpu_uuids=(), log_max_bytes=MIB, grace_seconds=2.5,
)  # fmt: skip
ON_A = replace(SPEC, gpu_uuids=(A,))


def docker(
    version: str = "20.10.24",
    api: str = "1.41",
    *,
    process: EngineProcess = NO_HOOK,
    specs: CdiDevices = CdiDevices(),  # noqa: B008
    **info: Any,
) -> EngineProfile:
    answered = {"Version": version, "ApiVersion": api, "Components": [{"Name": "Engine"}]}
    return read_profile(INFO | info, answered, [], process=process, specs=specs)


def podman(version: str = "4.3.1", *, specs: CdiDevices = CdiDevices()) -> EngineProfile:  # noqa: B008
    answered = {"Version": version, "Components": [{"Name": "Podman Engine"}]}
    return read_profile({**INFO, "Plugins": {"Log": ["k8s-file"]}}, answered, [], specs=specs)


def listed(*names: str, version: tuple[int, ...] = (0, 5, 0)) -> CdiDevices:
    return CdiDevices(versions=dict.fromkeys(names, version))


def chosen(profile: EngineProfile, *uuids: str) -> GpuAccess:
    return choose_gpu_access(profile.gpus, uuids)


# ---- the way ----


@pytest.mark.parametrize(
    ("profile", "way", "name"),
    [
        (docker("28.5.2", "1.51", CDISpecDirs=["/etc/cdi"], DiscoveredDevices=[{"ID": CDI_OF_A}]), GpuWay.CDI, ""),
        (docker("26.1.5", "1.45", CDISpecDirs=["/etc/cdi"], specs=listed(CDI_OF_A)), GpuWay.CDI, ""),
        (podman(specs=listed(CDI_OF_A)), GpuWay.CDI, ""),
        (docker(process=HOOK), GpuWay.DEVICE_REQUEST, "nvidia"),
        (docker("29.1.3", "1.52", process=HOOK), GpuWay.DEVICE_REQUEST, "nvidia"),
        (docker("29.2.0", "1.53", process=HOOK), GpuWay.DEVICE_REQUEST, "nvidia.runtime-hook"),
        (docker(Runtimes={"nvidia": NVIDIA_RUNTIME}), GpuWay.RUNTIME, "nvidia"),
        (docker(Runtimes={"gpus": NVIDIA_RUNTIME}), GpuWay.RUNTIME, "gpus"),
        (docker(process=HOOK, Runtimes={"nvidia": NVIDIA_RUNTIME}), GpuWay.DEVICE_REQUEST, "nvidia"),
        (docker(process=EngineProcess(), Runtimes={"nvidia": NVIDIA_RUNTIME}), GpuWay.RUNTIME, "nvidia"),
        (docker(process=EngineProcess()), GpuWay.DEVICE_REQUEST, "nvidia"),
        (docker(), GpuWay.NONE, ""),
        (podman(), GpuWay.NONE, ""),
        (podman("4.0.3", specs=listed(CDI_OF_A)), GpuWay.NONE, ""),
    ],
)
def test_cdi_comes_before_the_hook_and_the_hook_before_the_runtime(
    profile: EngineProfile, way: GpuWay, name: str
) -> None:
    access = chosen(profile, A)
    assert (access.way, access.name) == (way, name)
    assert bool(access.remedy) == (way is GpuWay.NONE)


def test_a_specification_that_lacks_one_of_the_gpus_is_passed_over_and_that_is_told() -> None:
    found = [{"Source": "cdi", "ID": CDI_OF_A}]
    stale = docker("28.5.2", "1.51", CDISpecDirs=["/etc/cdi"], DiscoveredDevices=found, process=HOOK)
    access = chosen(stale, A, MIG)
    assert access.way is GpuWay.DEVICE_REQUEST
    (why,) = access.passed_over
    assert MIG in why
    assert A not in why
    assert "nvidia-cdi-refresh" in why


def test_with_podman_a_stale_specification_leaves_no_way() -> None:
    access = chosen(podman(specs=listed(CDI_OF_A)), B)
    assert access.way is GpuWay.NONE
    assert B in access.words


def test_with_no_gpu_named_the_way_for_any_is_told() -> None:
    assert chosen(docker("28.5.2", "1.51", CDISpecDirs=["/c"], DiscoveredDevices=[{"ID": CDI_OF_A}])).way is GpuWay.CDI
    other = docker("28.5.2", "1.51", CDISpecDirs=["/c"], DiscoveredDevices=[{"ID": "other.com/nic=0"}], process=HOOK)
    assert chosen(other).way is GpuWay.DEVICE_REQUEST


def test_what_an_engine_tells_of_its_devices_counts_more_than_the_files() -> None:
    profile = docker("28.5.2", "1.51", CDISpecDirs=["/etc/cdi"], specs=listed(CDI_OF_A))
    assert chosen(profile, A).way is GpuWay.NONE


@pytest.mark.parametrize(
    ("profile", "works"),
    [
        (podman("4.3.1", specs=listed(CDI_OF_A, version=(0, 5, 0))), True),
        (podman("4.3.1", specs=listed(CDI_OF_A, version=(0, 6, 0))), False),
        (podman("5.4.2", specs=listed(CDI_OF_A, version=(0, 7, 0))), True),
        (docker("25.0.5", "1.44", CDISpecDirs=["/c"], specs=listed(CDI_OF_A, version=(0, 7, 0))), False),
        (docker("26.1.5", "1.45", CDISpecDirs=["/c"], specs=listed(CDI_OF_A, version=(0, 7, 0))), True),
        (docker("26.1.5", "1.45", CDISpecDirs=["/c"], specs=listed(CDI_OF_A, version=(0, 8, 0))), False),
    ],
)
def test_a_specification_too_new_for_the_engine_counts_as_none_and_that_is_told(
    profile: EngineProfile, works: bool
) -> None:
    access = chosen(profile, A)
    assert (access.way is GpuWay.CDI) is works
    assert works or "no-additional-gids" in access.words


def test_an_engine_that_can_hand_no_gpu_degrades_a_host_that_has_some() -> None:
    assert not any("GPU" in sentence for sentence in docker().degraded)
    (said,) = (line for line in docker(process=replace(NO_HOOK, has_gpu_driver=True)).degraded if "GPU" in line)
    assert "nvidia-container-toolkit" in said


def test_a_gpu_that_no_way_can_hand_is_a_fault_of_the_node_before_anything_is_made() -> None:
    for profile, make in ((docker(), create_body), (podman(), libpod_body)):
        with pytest.raises(NodeFaultError, match=r"can hand no GPU .*nvidia-container-toolkit") as caught:
            make(ON_A, profile, node_id="n", access=chosen(profile, A))
        assert caught.value.reason == "NODE_FAULT"


@pytest.mark.parametrize(
    ("text", "expected"), [("28.5.2+dfsg4", (28, 5, 2)), ("4.3.1", (4, 3, 1)), ("1.51", (1, 51)), ("dev", ()), ("", ())]
)
def test_a_version_is_its_leading_numbers(text: str, expected: tuple[int, ...]) -> None:
    assert numbers(text) == expected


# ---- the request ----


def host_config(profile: EngineProfile, spec: ContainerSpec) -> dict[str, Any]:
    access = chosen(profile, *spec.gpu_uuids) if spec.gpu_uuids else None
    config: dict[str, Any] = create_body(spec, profile, node_id="n", access=access)["HostConfig"]
    return config


def test_each_way_names_uuids_and_never_a_count() -> None:
    cdi = host_config(docker("28.5.2", "1.51", CDISpecDirs=["/c"], DiscoveredDevices=[{"ID": CDI_OF_A}]), ON_A)
    assert cdi["DeviceRequests"] == [{"Driver": "cdi", "DeviceIDs": [CDI_OF_A]}]
    hook = host_config(docker(process=HOOK), replace(SPEC, gpu_uuids=(A, MIG)))
    assert hook["DeviceRequests"] == [{"Driver": "nvidia", "DeviceIDs": [A, MIG], "Capabilities": [["gpu"]]}]
    runtime = host_config(docker(Runtimes={"nvidia": NVIDIA_RUNTIME}), ON_A)
    assert runtime["Runtime"] == "nvidia"
    assert "DeviceRequests" not in runtime


GPU_DEFAULT = {"DefaultRuntime": "nvidia", "Runtimes": {**INFO["Runtimes"], "nvidia": NVIDIA_RUNTIME}}


@pytest.mark.parametrize(
    ("info", "named"),
    [
        ({}, None),
        (GPU_DEFAULT, "runc"),
        ({"DefaultRuntime": "mine", "Runtimes": {"mine": NVIDIA_RUNTIME, "crun": {"path": "crun"}}}, "crun"),
        ({"DefaultRuntime": "mine", "Runtimes": {"mine": {"path": "/x"}, "runc": {"path": "runc"}}}, "runc"),
        ({"DefaultRuntime": "nvidia", "Runtimes": {"nvidia": NVIDIA_RUNTIME}}, None),
        ({"DefaultRuntime": "runsc", "Runtimes": {"runsc": {"path": "/x/runsc"}, "runc": {"path": "runc"}}}, None),
        ({"DefaultRuntime": "kata", "Runtimes": {"kata": {"runtimeType": "x"}, "runc": {"path": "runc"}}}, None),
        ({"DefaultRuntime": "crun", "Runtimes": {"crun": NVIDIA_RUNTIME, "runc": {"path": "runc"}}}, "runc"),
    ],
)
def test_a_task_without_gpus_names_a_plain_runtime_where_the_default_might_hand_it_some(
    info: dict[str, Any], named: str | None
) -> None:
    assert host_config(docker(**info), SPEC).get("Runtime") == named


def test_a_task_with_gpus_by_hook_or_cdi_gets_them_from_there_alone() -> None:
    by_hook = host_config(docker(process=HOOK, **GPU_DEFAULT), ON_A)
    assert (by_hook["Runtime"], by_hook["DeviceRequests"][0]["DeviceIDs"]) == ("runc", [A])


def test_nothing_but_the_lease_can_choose_gpus() -> None:
    env = (
        ("NVIDIA_VISIBLE_DEVICES", "all"), ("nvidia_visible_devices", "all"), ("NVIDIA_MIG_CONFIG_DEVICES", "all"),
        ("NVIDIA_IMEX_CHANNELS", "0"), ("NVIDIA_REQUIRE_CUDA", "cuda>=1"), ("NVIDIA_DRIVER_CAPABILITIES", "compute"),
        ("CUDA_MPS_PIPE_DIRECTORY", "/x"), ("CUDA_VISIBLE_DEVICES", "0"),
    )  # fmt: skip
    assert environment(replace(SPEC, env=env)) == [("CUDA_VISIBLE_DEVICES", "0"), ("NVIDIA_VISIBLE_DEVICES", "void")]
    for way, value in ((GpuWay.DEVICE_REQUEST, A), (GpuWay.RUNTIME, A), (GpuWay.CDI, "void")):
        assert environment(replace(ON_A, env=env), GpuAccess(way=way, name="nvidia")) == [
            ("CUDA_VISIBLE_DEVICES", "0"),
            ("NVIDIA_DRIVER_CAPABILITIES", "compute"),
            ("NVIDIA_VISIBLE_DEVICES", value),
        ]


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        (None, "compute,utility"),
        ("", "compute,utility"),
        ("video, compute", "compute,video"),
        ("display", "compute,utility"),
        ("all", "compute,utility,video,graphics,compat32,ngx"),
        ("utility,display,mystery", "utility"),
    ],
)
def test_a_task_with_gpus_chooses_parts_of_the_driver_but_never_the_display(asked: str | None, granted: str) -> None:
    env = () if asked is None else (("NVIDIA_DRIVER_CAPABILITIES", asked),)
    assert ",".join(driver_capabilities(replace(ON_A, env=env))) == granted


def test_podman_is_asked_natively_with_every_limit_that_its_compatible_interface_would_get() -> None:
    profile = podman(specs=listed(CDI_OF_A))
    spec = replace(
        ON_A, cpu_ids=(0, 1), cgroup_parent="/n/t", shell="a | b", stop_signal="SIGUSR1", read_bytes_per_second=5,
        rate_devices=(Path("/dev/vda"),), env=(("X", "1"),),
    )  # fmt: skip
    native = libpod_body(spec, profile, node_id="n", access=chosen(profile, A))
    compatible = create_body(replace(spec, gpu_uuids=()), profile, node_id="n")
    host = compatible["HostConfig"]
    assert json.loads(json.dumps(native)) == native
    assert native["devices"] == [{"path": CDI_OF_A}]
    limits = native["resource_limits"]
    assert limits["cpu"] == {"period": host["CpuPeriod"], "quota": host["CpuQuota"], "cpus": host["CpusetCpus"]}
    assert limits["memory"] == {"limit": host["Memory"], "swap": host["MemorySwap"]}
    assert limits["pids"] == {"limit": host["PidsLimit"]}
    assert native["shm_size"] == host["ShmSize"]
    assert native["r_limits"] == [
        {"type": limit["Name"], "soft": limit["Soft"], "hard": limit["Hard"]} for limit in host["Ulimits"]
    ]
    assert native["cap_drop"] == host["CapDrop"]
    assert native["no_new_privileges"] is True
    assert native["privileged"] is host["Privileged"]
    assert native["init"] is host["Init"]
    assert native["cgroup_parent"] == host["CgroupParent"]
    assert native["throttleReadBpsDevice"] == {"/dev/vda": {"rate": 5}}
    assert native["log_configuration"]["driver"] == host["LogConfig"]["Type"]
    assert native["log_configuration"]["size"] == int(host["LogConfig"]["Config"]["max-size"])
    assert [(mount["source"], mount["destination"]) for mount in native["mounts"]] == [("/r", "/results")]
    assert (native["entrypoint"], native["command"]) == (compatible["Entrypoint"], compatible["Cmd"])
    assert (native["stop_signal"], native["stop_timeout"]) == (10, compatible["StopTimeout"])
    assert native["healthconfig"] == compatible["Healthcheck"]
    assert native["labels"] == compatible["Labels"]
    assert native["env"] == {
        "X": "1", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility", "NVIDIA_VISIBLE_DEVICES": "void",
    }  # fmt: skip


# ---- what is read ----


def write_spec(path: Path, *names: str, version: str = "0.5.0") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    devices = "".join(f"- name: {name}\n  containerEdits: {{}}\n" for name in names)
    path.write_text(f"cdiVersion: {version}\nkind: nvidia.com/gpu\ndevices:\n{devices}")


def test_specifications_are_read_in_both_forms_from_all_directories(tmp_path: Path) -> None:
    write_spec(tmp_path / "etc/cdi/nvidia.yaml", A, "0", version="0.7.0")
    json_spec = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": [{"name": MIG}, {"name": A}]}
    (tmp_path / "run/cdi").mkdir(parents=True)
    (tmp_path / "run/cdi/mig.json").write_text(json.dumps(json_spec))
    (tmp_path / "run/cdi/notes.txt").write_text("no specification")
    (tmp_path / "var").mkdir()
    (tmp_path / "var/run").symlink_to("/run")
    read = read_cdi_specs(tmp_path)
    assert read.versions == {
        CDI_OF_A: (0, 5, 0),  # of the later directory
        "nvidia.com/gpu=0": (0, 7, 0),
        f"nvidia.com/gpu={MIG}": (0, 5, 0),
    }
    assert read.problems == ()


def test_a_name_in_two_files_of_one_directory_can_be_resolved_by_nobody(tmp_path: Path) -> None:
    write_spec(tmp_path / "etc/cdi/a.yaml", A, B)
    write_spec(tmp_path / "etc/cdi/b.yaml", A)
    read = read_cdi_specs(tmp_path)
    assert set(read.versions) == {f"nvidia.com/gpu={B}"}
    assert [CDI_OF_A in problem for problem in read.problems] == [True]


@pytest.mark.parametrize("text", ["", "[", "a: [1", "devices: 3", "devices: []\ncdiVersion: x", "- 1", "\x00"])
def test_a_file_that_is_no_specification_is_told_and_the_others_still_count(tmp_path: Path, text: str) -> None:
    write_spec(tmp_path / "etc/cdi/good.yaml", A)
    (tmp_path / "etc/cdi/bad.yaml").write_text(text)
    read = read_cdi_specs(tmp_path)
    assert set(read.versions) == {CDI_OF_A}
    assert [problem.startswith("/etc/cdi/bad.yaml is no CDI") for problem in read.problems] == [True]


def test_without_directories_there_are_no_devices_and_no_problem(tmp_path: Path) -> None:
    assert read_cdi_specs(tmp_path) == CdiDevices()


def test_a_program_is_looked_for_on_the_given_path_below_the_given_root(tmp_path: Path) -> None:
    (tmp_path / "opt/bin").mkdir(parents=True)
    program = tmp_path / "opt/bin/hook"
    program.write_text("#!/bin/sh\n")
    assert not has_program("hook", "/opt/bin", tmp_path), "it can't be executed"
    program.chmod(0o755)
    assert has_program("hook", "/usr/bin:/opt/bin", tmp_path)
    assert not has_program("hook", "/usr/bin:opt/bin", tmp_path)
    with pytest.raises(OSError, match=os.fspath(tmp_path / "gone")):
        has_program("hook", "/opt/bin", tmp_path / "gone")
