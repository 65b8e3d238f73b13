"""A virtual machine as a provider hands it over: Debian with systemd and ssh, no engine, nothing of ours.

It reaches the package mirrors. Two empty disks are in it: /dev/vdb (700 MiB) and /dev/vdc (3 GiB).
"""

from __future__ import annotations

from typing import ClassVar

from tests.vm.machine import Machine


class BareMachine(Machine):
    packages: ClassVar[str] = "bare.txt"
    network: ClassVar[str] = ""

    def inventory_host(self) -> str:
        """How Ansible reaches it, as variables of a host."""
        options = (
            f"-o UserKnownHostsFile={self.image / 'known_hosts'} -o HostKeyAlias=nodeservice-vm -o ConnectTimeout=30"
            " -o ControlMaster=auto -o ControlPersist=120"
        )
        return (
            f"ansible_host=127.0.0.1 ansible_port={self.port} ansible_user=root"
            f" ansible_ssh_private_key_file={self.image / 'id_ed25519'} ansible_ssh_common_args='{options}'"
        )

    def _fill_payload(self) -> None:
        pass

    def _set_up(self) -> None:
        pass
