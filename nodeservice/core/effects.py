"""What must be done next: commands, imperative. Each is safe to run twice, since recovery runs it again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Effect:
    pass


@dataclass(frozen=True, slots=True)
class PullImage(Effect):
    """Ends in ImagePulled or StepFailed."""


@dataclass(frozen=True, slots=True)
class CreateContainer(Effect):
    """Look up by name first, since a crash may have come after the create. Ends in ContainerCreated or StepFailed."""


@dataclass(frozen=True, slots=True)
class StartContainer(Effect):
    """A container that already runs or ran is success. Ends in ContainerStarted, StepFailed or ContainerLost."""


@dataclass(frozen=True, slots=True)
class WatchContainer(Effect):
    """Follow the log, keep the deadline, wait for the end. Ends in ContainerExited or ContainerLost."""


@dataclass(frozen=True, slots=True)
class CancelStep(Effect):
    """Interrupt a pull that is under way. The pull then ends in StepFailed."""


@dataclass(frozen=True, slots=True)
class StopContainer(Effect):
    """The stop signal, grace, SIGKILL; SIGKILL at once for what broke a limit. The end is reported by WatchContainer."""


@dataclass(frozen=True, slots=True)
class KillContainer(Effect):
    """SIGKILL at once, in place of a StopContainer that is under way."""


@dataclass(frozen=True, slots=True)
class CollectResults(Effect):
    """Make sure no container of the attempt runs, drain its log, read its usage, freeze its output.

    Ends in ResultsCollected or CollectFailed; tells ContainerStuck on the way when something can't be ended.
    """


@dataclass(frozen=True, slots=True)
class UploadResults(Effect):
    """Ends in ResultsStored, or in ResultsRetained once the limit of retrying has passed."""


@dataclass(frozen=True, slots=True)
class ReportOutcome(Effect):
    """Repeats until the master acknowledges. Ends in ReportAcknowledged."""


@dataclass(frozen=True, slots=True)
class CleanUp(Effect):
    """Remove container, cgroup and working directory. Ends in CleanedUp."""


@dataclass(frozen=True, slots=True)
class StoreRetained(Effect):
    """Upload results that were kept on the host, for as long as it takes; then drop the copy. Ends in ResultsStored."""


@dataclass(frozen=True, slots=True)
class ReleaseCompute(Effect):
    """Give CPU, memory and GPUs back to the ledger."""


@dataclass(frozen=True, slots=True)
class ReleaseDisk(Effect):
    """Give the disk back to the ledger."""
