"""What the Ansible roles write: their templates, rendered by Ansible itself, are read by who shall read them.

One playbook renders all cases, each a host of its own with false GPUs, on this machine and without changing it.
"""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeservice.config import load_config

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
ROLES = ROOT / "ansible" / "roles"
GPUS = {"0000:01:00.0": ("0x10de", "0x030200"), "0000:02:00.0": ("0x10de", "0x030000")}
OTHERS = {
    "0000:00:02.0": ("0x8086", "0x030000"),
    "0000:01:00.1": ("0x10de", "0x040300"),
    "0000:05:00.0": ("0x10de", "0x068000"),
}
"""A graphics card of somebody else, the sound of an NVIDIA card, an NVSwitch."""
UBUNTU = {"distribution": "Ubuntu", "distribution_version": "24.04", "distribution_major_version": "24"}
DEBIAN = {"distribution": "Debian", "distribution_version": "12.9", "distribution_major_version": "12"}
TLS = {"nodeservice_tls_ca": "ca", "nodeservice_tls_cert": "cert", "nodeservice_tls_key": "key"}
PLAIN = {"nodeservice_insecure": True}
FOREIGN = {"dns": ["9.9.9.9"], "log-opts": {"labels": "team"}, "log-driver": "journald", "features": {"buildkit": True}}

CASES: dict[str, dict[str, Any]] = {
    "tls": {
        "role": "nodeservice",
        "given": TLS | {"nodeservice_master_address": "m.example:50051", "nodeservice_worker_id": "gpu-1"},
        "render": ["node.toml", "node.env", "journald.conf"],
    },
    "s3": {
        "role": "nodeservice",
        "given": PLAIN
        | {
            "nodeservice_settings": {
                "minio": "10.0.0.5:9000",
                "result_prefix": "team/a",
                "gpu_sharing": "watched",
                "default_timeout_seconds": 1.5,
                "minio_region": 'Zürich \\ "x" 🌍',
                "log_level": None,
            },
            "nodeservice_secrets": {"MINIO_ACCESS_KEY": "who", "MINIO_SECRET_KEY": 'a"b\\c'},
        },
        "render": ["node.toml", "node.env"],
    },
    "unknown_key": {
        "role": "nodeservice",
        "given": PLAIN | {"nodeservice_settings": {"heartbeat": 3}},
        "render": ["node.toml"],
    },
    "master": {
        "role": "nodeservice_master",
        "given": {f"nodeservice_master_{key.removeprefix('nodeservice_')}": value for key, value in TLS.items()}
        | {"nodeservice_master_settings": {"node": ["10.0.0.7:50052"], "node_loss_retries": 5}},
        "render": ["master.toml", "master.env"],
    },
    "engine_new": {"role": "docker_engine", "given": {"docker_engine_text": ""}, "evaluate": "docker_engine_merged"},
    "engine_merged": {
        "role": "docker_engine",
        "given": {
            "docker_engine_text": json.dumps(FOREIGN),
            "docker_engine_options": {"mtu": 1400, "live-restore": False},
        },
        "evaluate": "docker_engine_merged",
    },
    "engine_gpu": {
        "role": "docker_engine",
        "pci": GPUS,
        "given": {"docker_engine_text": json.dumps(FOREIGN), "docker_engine_number": "27.5"},
        "evaluate": "docker_engine_merged",
    },
    "engine_gpu_newer": {
        "role": "docker_engine",
        "pci": GPUS,
        "given": {"docker_engine_text": "{}", "docker_engine_number": "28.2"},
        "evaluate": "docker_engine_merged",
    },
    "driver_ubuntu": {
        "role": "nvidia_driver",
        "pci": GPUS | OTHERS,
        "facts": UBUNTU,
        "given": {"nvidia_driver_source": "distribution"},
        "render": ["nodeservice-nvidia.conf", "persistenced.conf", "nvidia-cuda.sources"],
        "evaluate": "nvidia_driver_packages",
    },
    "driver_debian": {
        "role": "nvidia_driver",
        "pci": GPUS,
        "facts": DEBIAN,
        "given": {},
        "render": ["nvidia-cuda.sources"],
        "evaluate": "nvidia_driver_packages",
    },
    "gpus": {"role": "nvidia_gpus", "pci": GPUS | OTHERS, "given": {}, "evaluate": "nvidia_gpus_addresses"},
    "no_gpus": {"role": "nvidia_gpus", "pci": OTHERS, "given": {}, "evaluate": "nvidia_gpus_present"},
    "switches": {"role": "nvidia_gpus", "pci": GPUS | OTHERS, "given": {}, "evaluate": "nvidia_gpus_nvswitches"},
    "toolkit_old_engine": {
        "role": "nvidia_container_toolkit",
        "given": {"nvidia_container_toolkit_engine": "25.0.5"},
        "render": ["nvidia-cdi-refresh.env", "nvidia-container-toolkit.sources"],
    },
    "toolkit_new_engine": {
        "role": "nvidia_container_toolkit",
        "given": {"nvidia_container_toolkit_engine": "28.2.2"},
        "render": ["nvidia-cdi-refresh.env"],
    },
    "volume": {
        "role": "quota_volume",
        "given": {
            "quota_volume_device": "/dev/vdc",
            "quota_volume_path": "/srv/x",
            "quota_volume_found": {"stdout": "ext4\n"},
        },
        "render": ["volume.mount"],
    },
    "minio": {
        "role": "minio",
        "given": {"minio_root_user": "root", "minio_root_password": 'pass"word'},
        "render": ["minio.env", "minio.service"],
    },
    "collector": {
        "role": "otel_collector",
        "given": {
            "otel_collector_tls_cert": "c",
            "otel_collector_tls_key": "k",
            "otel_collector_tls_ca": "a",
            "otel_collector_exporters": {"otlp": {"endpoint": "tempo:4317"}, "debug": {}},
            "otel_collector_metrics_exporters": {"prometheus": {"endpoint": "0.0.0.0:9464"}, "debug": {}},
            "otel_collector_settings": {"processors": {"batch": {"timeout": "2s"}}},
        },
        "render": ["config.yaml", "otel-collector.service"],
    },
}


def of_role(name: str) -> dict[str, Any]:
    """Defaults, and over them the role's own variables, as Ansible orders them below and above a host's."""
    role = ROLES / name
    parts = [
        yaml.safe_load(path.read_text())
        for path in (role / "defaults/main.yml", role / "vars/main.yml")
        if path.exists()
    ]
    return {key: value for part in parts for key, value in part.items()}


def false_pci(folder: Path, devices: dict[str, tuple[str, str]]) -> Path:
    for address, (vendor, kind) in devices.items():
        (folder / address).mkdir(parents=True)
        (folder / address / "vendor").write_text(f"{vendor}\n")
        (folder / address / "class").write_text(f"{kind}\n")
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case."""
    folder = tmp_path_factory.mktemp("ansible")
    hosts = {
        name: of_role(case["role"])
        | {"role_path": str(ROLES / case["role"]), "out": str(folder), "ansible_managed": "by hand"}
        | {"ansible_python_interpreter": sys.executable, "docker_engine_number": "20.10"}
        | {"false_facts": {"architecture": "x86_64", **case.get("facts", DEBIAN)}}
        | {"nvidia_gpus_pci_path": str(false_pci(folder / f"{name}.pci", case.get("pci", {})))}
        | case["given"]
        | {"render": case.get("render", []), "evaluate": case.get("evaluate", "")}
        for name, case in CASES.items()
    }
    inventory = folder / "inventory.json"
    inventory.write_text(json.dumps({"all": {"hosts": hosts}}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    command = Path(sys.executable).with_name("ansible-playbook")
    done = subprocess.run(
        [command, "-i", inventory, "--forks", "4", ROOT / "tests/ansible/render.yml"],
        env=environment
        | {f"ANSIBLE_{name.upper()}": str(folder / name) for name in ("home", "local_temp", "remote_temp")}
        | {"ANSIBLE_ROLES_PATH": str(ROLES), "ANSIBLE_NOCOLOR": "1"},
        cwd=folder, capture_output=True, text=True, check=False, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    for name in CASES:
        (folder / name).mkdir()
        for template, text in json.loads((folder / f"{name}.json").read_text())["texts"].items():
            (folder / name / template).write_text(text)
    return folder


def evaluated(rendered: Path, name: str) -> Any:
    return json.loads((rendered / f"{name}.json").read_text())["value"]


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text())
    return parser


def test_the_node_reads_the_settings_that_the_role_writes(rendered: Path) -> None:
    settings = load_config(rendered / "tls" / "node.toml", {}, {})
    assert (settings.worker_id, settings.master, settings.listen) == ("gpu-1", "m.example:50051", "0.0.0.0:50052")
    assert str(settings.tls_key) == "/etc/nodeservice/tls/node.key"


def test_values_of_any_kind_survive_the_way_into_the_settings(rendered: Path) -> None:
    secrets = {"MINIO_ACCESS_KEY": "who", "MINIO_SECRET_KEY": "x"}
    settings = load_config(rendered / "s3" / "node.toml", {}, secrets)
    assert settings.result_store == "s3"
    assert settings.minio_region == 'Zürich \\ "x" 🌍'
    assert (settings.default_timeout_seconds, settings.log_level, settings.insecure) == (1.5, "info", True)


def test_an_unknown_setting_is_found_before_it_is_installed(rendered: Path) -> None:
    with pytest.raises(Exception, match="unknown key"):
        load_config(rendered / "unknown_key" / "node.toml", {}, {})


def test_secrets_are_quoted_for_systemd(rendered: Path) -> None:
    lines = (rendered / "s3" / "node.env").read_text().splitlines()
    assert lines[1:] == ['MINIO_ACCESS_KEY="who"', 'MINIO_SECRET_KEY="a\\"b\\\\c"']


def test_the_master_s_settings_are_options_of_the_master(rendered: Path) -> None:
    written = tomllib.loads((rendered / "master" / "master.toml").read_text())
    told = subprocess.run(
        [sys.executable, "-m", "nodeservice", "master", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert written["node"] == ["10.0.0.7:50052"]
    assert [key for key in written if f"--{key.replace('_', '-')}" not in told] == []


def test_an_engine_without_configuration_gets_ours(rendered: Path) -> None:
    assert evaluated(rendered, "engine_new") == {
        "data-root": "/var/lib/docker",
        "live-restore": True,
        "log-driver": "json-file",
        "log-opts": {"max-file": "3", "max-size": "10m"},
    }


def test_keys_of_others_stay_in_the_engine_s_configuration(rendered: Path) -> None:
    merged = evaluated(rendered, "engine_merged")
    assert (merged["dns"], merged["features"], merged["log-opts"]["labels"]) == (
        ["9.9.9.9"],
        {"buildkit": True},
        "team",
    )
    assert (merged["log-driver"], merged["log-opts"]["max-size"]) == ("json-file", "10m")
    assert (merged["mtu"], merged["live-restore"]) == (1400, False), "the operator has the last word"


def test_an_engine_that_needs_it_is_told_to_use_cdi_and_never_nvidia_by_default(rendered: Path) -> None:
    assert evaluated(rendered, "engine_gpu")["features"] == {"buildkit": True, "cdi": True}
    assert "features" not in evaluated(rendered, "engine_gpu_newer")
    assert all("default-runtime" not in evaluated(rendered, name) for name in ("engine_gpu", "engine_gpu_newer"))


def test_a_gpu_is_told_from_sound_switches_and_other_vendors(rendered: Path) -> None:
    assert sorted(evaluated(rendered, "gpus")) == sorted(GPUS)
    assert evaluated(rendered, "no_gpus") is False
    assert evaluated(rendered, "switches") == ["0000:05:00.0"]


def test_the_driver_s_packages_follow_source_and_system(rendered: Path) -> None:
    assert evaluated(rendered, "driver_ubuntu") == ["nvidia-headless-580-server-open", "nvidia-utils-580-server"]
    assert "nvidia-kernel-open-dkms" in evaluated(rendered, "driver_debian")
    assert "/repos/ubuntu2404/x86_64\n" in (rendered / "driver_ubuntu" / "nvidia-cuda.sources").read_text()
    assert "/repos/debian12/x86_64\n" in (rendered / "driver_debian" / "nvidia-cuda.sources").read_text()


def test_persistence_replaces_the_command_of_the_unit(rendered: Path) -> None:
    lines = (rendered / "driver_ubuntu" / "persistenced.conf").read_text().splitlines()
    assert lines[2] == "ExecStart="
    assert "--persistence-mode" in lines[3].split()


def test_an_old_engine_gets_specifications_that_it_can_read(rendered: Path) -> None:
    flag = "NVIDIA_CTK_CDI_GENERATE_FEATURE_FLAGS=no-additional-gids-for-device-nodes"
    assert flag in (rendered / "toolkit_old_engine" / "nvidia-cdi-refresh.env").read_text()
    assert flag not in (rendered / "toolkit_new_engine" / "nvidia-cdi-refresh.env").read_text()


def test_a_volume_keeps_the_file_system_that_it_has(rendered: Path) -> None:
    mount = unit(rendered / "volume" / "volume.mount")["Mount"]
    assert dict(mount) == {"What": "/dev/vdc", "Where": "/srv/x", "Type": "ext4", "Options": "prjquota"}


def test_minio_gets_its_password_from_a_file_and_no_rights_beyond_its_data(rendered: Path) -> None:
    service = unit(rendered / "minio" / "minio.service")["Service"]
    assert service["ExecStart"].endswith("--certs-dir /etc/minio/certs /var/lib/minio")
    assert "pass" not in (rendered / "minio" / "minio.service").read_text().lower()
    assert (service["ProtectSystem"], service["ReadWritePaths"]) == ("strict", "/var/lib/minio")
    assert 'MINIO_ROOT_PASSWORD="pass\\"word"' in (rendered / "minio" / "minio.env").read_text()


def test_the_collector_sends_what_it_gets_to_every_exporter(rendered: Path) -> None:
    config = yaml.safe_load((rendered / "collector" / "config.yaml").read_text())
    grpc = config["receivers"]["otlp"]["protocols"]["grpc"]
    assert grpc["tls"]["client_ca_file"] == "/etc/otel-collector/ca.pem"
    pipelines = config["service"]["pipelines"]
    assert pipelines["traces"]["exporters"] == ["debug", "otlp"]
    assert pipelines["metrics"]["exporters"] == ["debug", "prometheus"]
    assert config["exporters"].keys() == {"debug", "otlp", "prometheus"}
    assert config["processors"]["batch"] == {"timeout": "2s"}
    for pipeline in pipelines.values():
        assert pipeline["receivers"] == ["otlp"]
        assert set(pipeline["processors"]) <= set(config["processors"])
    service = unit(rendered / "collector" / "otel-collector.service")["Service"]
    assert service["ExecStart"].endswith(" --config=/etc/otel-collector/config.yaml")


@pytest.mark.parametrize("role", sorted(path.name for path in ROLES.iterdir()))
def test_every_variable_with_a_default_is_specified_and_explained(role: str) -> None:
    specification = yaml.safe_load((ROLES / role / "meta" / "argument_specs.yml").read_text())
    specified = specification["argument_specs"]["main"]["options"]
    defaults = yaml.safe_load((ROLES / role / "defaults" / "main.yml").read_text())
    assert set(defaults) <= set(specified)
    assert all(option["description"] for option in specified.values())
    for name, option in specified.items():
        if "default" in option:
            assert defaults[name] == option["default"], name


def test_no_role_hides_a_failure() -> None:
    lazy = [str(path) for path in (ROOT / "ansible").rglob("*.yml") if "ignore_errors" in path.read_text()]
    assert lazy == []
