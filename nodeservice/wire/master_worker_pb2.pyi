from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerInfo(_message.Message):
    __slots__ = ("worker_id", "worker_ip", "total_cpu", "total_memory", "total_storage", "total_gpu", "capacity", "allocatable", "free", "gpus", "kernel", "cgroup_version", "engine", "engine_version", "node_version", "listen_address", "gpu_driver_version", "cuda_version", "warnings")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_IP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_CPU_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MEMORY_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STORAGE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_GPU_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    ALLOCATABLE_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    CGROUP_VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_VERSION_FIELD_NUMBER: _ClassVar[int]
    LISTEN_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GPU_DRIVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    CUDA_VERSION_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_ip: str
    total_cpu: float
    total_memory: float
    total_storage: float
    total_gpu: float
    capacity: Resources
    allocatable: Resources
    free: Resources
    gpus: _containers.RepeatedCompositeFieldContainer[GpuInfo]
    kernel: str
    cgroup_version: int
    engine: str
    engine_version: str
    node_version: str
    listen_address: str
    gpu_driver_version: str
    cuda_version: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_id: _Optional[str] = ..., worker_ip: _Optional[str] = ..., total_cpu: _Optional[float] = ..., total_memory: _Optional[float] = ..., total_storage: _Optional[float] = ..., total_gpu: _Optional[float] = ..., capacity: _Optional[_Union[Resources, _Mapping]] = ..., allocatable: _Optional[_Union[Resources, _Mapping]] = ..., free: _Optional[_Union[Resources, _Mapping]] = ..., gpus: _Optional[_Iterable[_Union[GpuInfo, _Mapping]]] = ..., kernel: _Optional[str] = ..., cgroup_version: _Optional[int] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., node_version: _Optional[str] = ..., listen_address: _Optional[str] = ..., gpu_driver_version: _Optional[str] = ..., cuda_version: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class Resources(_message.Message):
    __slots__ = ("cpu_milli", "memory_bytes", "disk_bytes", "gpu_count")
    CPU_MILLI_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_COUNT_FIELD_NUMBER: _ClassVar[int]
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    gpu_count: int
    def __init__(self, cpu_milli: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., gpu_count: _Optional[int] = ...) -> None: ...

class GpuInfo(_message.Message):
    __slots__ = ("uuid", "name", "memory_total_bytes", "memory_used_bytes", "utilization_percent", "memory_reserved_bytes", "compute_capability", "pci_address", "numa_node", "mig_profile", "parent_uuid", "leasable", "counted", "state", "state_reason", "held_milli", "power_watts", "temperature_celsius", "throttle_reasons", "share_methods", "nvlink_count", "ecc_enabled", "ecc_uncorrected_count", "power_limit_watts")
    UUID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    UTILIZATION_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    PCI_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUMA_NODE_FIELD_NUMBER: _ClassVar[int]
    MIG_PROFILE_FIELD_NUMBER: _ClassVar[int]
    PARENT_UUID_FIELD_NUMBER: _ClassVar[int]
    LEASABLE_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_REASON_FIELD_NUMBER: _ClassVar[int]
    HELD_MILLI_FIELD_NUMBER: _ClassVar[int]
    POWER_WATTS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    THROTTLE_REASONS_FIELD_NUMBER: _ClassVar[int]
    SHARE_METHODS_FIELD_NUMBER: _ClassVar[int]
    NVLINK_COUNT_FIELD_NUMBER: _ClassVar[int]
    ECC_ENABLED_FIELD_NUMBER: _ClassVar[int]
    ECC_UNCORRECTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    POWER_LIMIT_WATTS_FIELD_NUMBER: _ClassVar[int]
    uuid: str
    name: str
    memory_total_bytes: int
    memory_used_bytes: int
    utilization_percent: float
    memory_reserved_bytes: int
    compute_capability: str
    pci_address: str
    numa_node: int
    mig_profile: str
    parent_uuid: str
    leasable: bool
    counted: bool
    state: str
    state_reason: str
    held_milli: int
    power_watts: float
    temperature_celsius: float
    throttle_reasons: _containers.RepeatedScalarFieldContainer[str]
    share_methods: _containers.RepeatedScalarFieldContainer[str]
    nvlink_count: int
    ecc_enabled: bool
    ecc_uncorrected_count: int
    power_limit_watts: float
    def __init__(self, uuid: _Optional[str] = ..., name: _Optional[str] = ..., memory_total_bytes: _Optional[int] = ..., memory_used_bytes: _Optional[int] = ..., utilization_percent: _Optional[float] = ..., memory_reserved_bytes: _Optional[int] = ..., compute_capability: _Optional[str] = ..., pci_address: _Optional[str] = ..., numa_node: _Optional[int] = ..., mig_profile: _Optional[str] = ..., parent_uuid: _Optional[str] = ..., leasable: _Optional[bool] = ..., counted: _Optional[bool] = ..., state: _Optional[str] = ..., state_reason: _Optional[str] = ..., held_milli: _Optional[int] = ..., power_watts: _Optional[float] = ..., temperature_celsius: _Optional[float] = ..., throttle_reasons: _Optional[_Iterable[str]] = ..., share_methods: _Optional[_Iterable[str]] = ..., nvlink_count: _Optional[int] = ..., ecc_enabled: _Optional[bool] = ..., ecc_uncorrected_count: _Optional[int] = ..., power_limit_watts: _Optional[float] = ...) -> None: ...

class GpuRequest(_message.Message):
    __slots__ = ("model", "min_memory_bytes", "min_compute_capability", "mig_profile", "uuids", "share")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MIN_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MIN_COMPUTE_CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    MIG_PROFILE_FIELD_NUMBER: _ClassVar[int]
    UUIDS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    model: str
    min_memory_bytes: int
    min_compute_capability: str
    mig_profile: str
    uuids: _containers.RepeatedScalarFieldContainer[str]
    share: GpuShare
    def __init__(self, model: _Optional[str] = ..., min_memory_bytes: _Optional[int] = ..., min_compute_capability: _Optional[str] = ..., mig_profile: _Optional[str] = ..., uuids: _Optional[_Iterable[str]] = ..., share: _Optional[_Union[GpuShare, _Mapping]] = ...) -> None: ...

class GpuShare(_message.Message):
    __slots__ = ("memory_bytes", "sm_percent")
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    memory_bytes: int
    sm_percent: int
    def __init__(self, memory_bytes: _Optional[int] = ..., sm_percent: _Optional[int] = ...) -> None: ...

class GpuPart(_message.Message):
    __slots__ = ("memory_bytes", "sm_percent", "method")
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    memory_bytes: int
    sm_percent: int
    method: str
    def __init__(self, memory_bytes: _Optional[int] = ..., sm_percent: _Optional[int] = ..., method: _Optional[str] = ...) -> None: ...

class GpuUsage(_message.Message):
    __slots__ = ("uuid", "name", "seconds", "utilization_mean_percent", "utilization_peak_percent", "memory_peak_bytes", "energy_joules", "throttled_seconds", "xids")
    UUID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    UTILIZATION_MEAN_PERCENT_FIELD_NUMBER: _ClassVar[int]
    UTILIZATION_PEAK_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENERGY_JOULES_FIELD_NUMBER: _ClassVar[int]
    THROTTLED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    XIDS_FIELD_NUMBER: _ClassVar[int]
    uuid: str
    name: str
    seconds: float
    utilization_mean_percent: float
    utilization_peak_percent: float
    memory_peak_bytes: int
    energy_joules: float
    throttled_seconds: float
    xids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, uuid: _Optional[str] = ..., name: _Optional[str] = ..., seconds: _Optional[float] = ..., utilization_mean_percent: _Optional[float] = ..., utilization_peak_percent: _Optional[float] = ..., memory_peak_bytes: _Optional[int] = ..., energy_joules: _Optional[float] = ..., throttled_seconds: _Optional[float] = ..., xids: _Optional[_Iterable[int]] = ...) -> None: ...

class NodeMode(_message.Message):
    __slots__ = ("mode", "deadline_seconds")
    MODE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    mode: str
    deadline_seconds: float
    def __init__(self, mode: _Optional[str] = ..., deadline_seconds: _Optional[float] = ...) -> None: ...

class NodeModeAck(_message.Message):
    __slots__ = ("success", "message", "mode", "unfinished_tasks", "reason")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_TASKS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    success: bool
    message: str
    mode: str
    unfinished_tasks: int
    reason: str
    def __init__(self, success: _Optional[bool] = ..., message: _Optional[str] = ..., mode: _Optional[str] = ..., unfinished_tasks: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class MasterInfo(_message.Message):
    __slots__ = ("master_id", "master_address")
    MASTER_ID_FIELD_NUMBER: _ClassVar[int]
    MASTER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    master_id: str
    master_address: str
    def __init__(self, master_id: _Optional[str] = ..., master_address: _Optional[str] = ...) -> None: ...

class RegisterAck(_message.Message):
    __slots__ = ("success", "message", "wants_releases")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    WANTS_RELEASES_FIELD_NUMBER: _ClassVar[int]
    success: bool
    message: str
    wants_releases: bool
    def __init__(self, success: _Optional[bool] = ..., message: _Optional[str] = ..., wants_releases: _Optional[bool] = ...) -> None: ...

class TaskAck(_message.Message):
    __slots__ = ("success", "message", "reason", "field")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    success: bool
    message: str
    reason: str
    field: str
    def __init__(self, success: _Optional[bool] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ..., field: _Optional[str] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("success", "message")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    success: bool
    message: str
    def __init__(self, success: _Optional[bool] = ..., message: _Optional[str] = ...) -> None: ...

class HeartbeatAck(_message.Message):
    __slots__ = ("success", "wants_releases")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    WANTS_RELEASES_FIELD_NUMBER: _ClassVar[int]
    success: bool
    wants_releases: bool
    def __init__(self, success: _Optional[bool] = ..., wants_releases: _Optional[bool] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("worker_id", "cpu_usage", "memory_usage", "storage_usage", "running_tasks", "gpu_usage", "allocatable", "free", "gpus", "draining", "conditions", "warnings")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CPU_USAGE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USAGE_FIELD_NUMBER: _ClassVar[int]
    STORAGE_USAGE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_TASKS_FIELD_NUMBER: _ClassVar[int]
    GPU_USAGE_FIELD_NUMBER: _ClassVar[int]
    ALLOCATABLE_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    CONDITIONS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    cpu_usage: float
    memory_usage: float
    storage_usage: float
    running_tasks: _containers.RepeatedCompositeFieldContainer[RunningTask]
    gpu_usage: float
    allocatable: Resources
    free: Resources
    gpus: _containers.RepeatedCompositeFieldContainer[GpuInfo]
    draining: bool
    conditions: _containers.RepeatedScalarFieldContainer[str]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_id: _Optional[str] = ..., cpu_usage: _Optional[float] = ..., memory_usage: _Optional[float] = ..., storage_usage: _Optional[float] = ..., running_tasks: _Optional[_Iterable[_Union[RunningTask, _Mapping]]] = ..., gpu_usage: _Optional[float] = ..., allocatable: _Optional[_Union[Resources, _Mapping]] = ..., free: _Optional[_Union[Resources, _Mapping]] = ..., gpus: _Optional[_Iterable[_Union[GpuInfo, _Mapping]]] = ..., draining: _Optional[bool] = ..., conditions: _Optional[_Iterable[str]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class RunningTask(_message.Message):
    __slots__ = ("task_id", "cpu_allocated", "memory_allocated", "status", "gpu_allocated", "attempt", "phase", "phase_started_at_unix_ms", "gpu_uuids", "gpu_part", "compute_released")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    CPU_ALLOCATED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_ALLOCATED_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    GPU_ALLOCATED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PHASE_STARTED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    GPU_UUIDS_FIELD_NUMBER: _ClassVar[int]
    GPU_PART_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_RELEASED_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    cpu_allocated: float
    memory_allocated: float
    status: str
    gpu_allocated: float
    attempt: int
    phase: str
    phase_started_at_unix_ms: int
    gpu_uuids: _containers.RepeatedScalarFieldContainer[str]
    gpu_part: GpuPart
    compute_released: bool
    def __init__(self, task_id: _Optional[str] = ..., cpu_allocated: _Optional[float] = ..., memory_allocated: _Optional[float] = ..., status: _Optional[str] = ..., gpu_allocated: _Optional[float] = ..., attempt: _Optional[int] = ..., phase: _Optional[str] = ..., phase_started_at_unix_ms: _Optional[int] = ..., gpu_uuids: _Optional[_Iterable[str]] = ..., gpu_part: _Optional[_Union[GpuPart, _Mapping]] = ..., compute_released: _Optional[bool] = ...) -> None: ...

class EnvVar(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("task_id", "docker_image", "command", "req_cpu", "req_memory", "req_storage", "req_gpu", "target_worker_id", "user_id", "sla_multiplier", "task_type", "task_name", "submitted_at", "attempt", "argv", "env", "timeout_seconds", "grace_seconds", "pull_policy", "cpu_milli", "memory_bytes", "disk_bytes", "pids_limit", "wait_timeout_seconds", "pull_timeout_seconds", "total_timeout_seconds", "stop_signal", "exclusive_cpus", "open_files_limit", "read_bytes_per_second", "write_bytes_per_second", "gpu", "disconnect_limit_seconds", "max_retries", "retry_own_failures")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    DOCKER_IMAGE_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    REQ_CPU_FIELD_NUMBER: _ClassVar[int]
    REQ_MEMORY_FIELD_NUMBER: _ClassVar[int]
    REQ_STORAGE_FIELD_NUMBER: _ClassVar[int]
    REQ_GPU_FIELD_NUMBER: _ClassVar[int]
    TARGET_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    SLA_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    TASK_TYPE_FIELD_NUMBER: _ClassVar[int]
    TASK_NAME_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_AT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ARGV_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PULL_POLICY_FIELD_NUMBER: _ClassVar[int]
    CPU_MILLI_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PIDS_LIMIT_FIELD_NUMBER: _ClassVar[int]
    WAIT_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PULL_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STOP_SIGNAL_FIELD_NUMBER: _ClassVar[int]
    EXCLUSIVE_CPUS_FIELD_NUMBER: _ClassVar[int]
    OPEN_FILES_LIMIT_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    WRITE_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    DISCONNECT_LIMIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_RETRIES_FIELD_NUMBER: _ClassVar[int]
    RETRY_OWN_FAILURES_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    docker_image: str
    command: str
    req_cpu: float
    req_memory: float
    req_storage: float
    req_gpu: float
    target_worker_id: str
    user_id: str
    sla_multiplier: float
    task_type: str
    task_name: str
    submitted_at: int
    attempt: int
    argv: _containers.RepeatedScalarFieldContainer[str]
    env: _containers.RepeatedCompositeFieldContainer[EnvVar]
    timeout_seconds: float
    grace_seconds: float
    pull_policy: str
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    pids_limit: int
    wait_timeout_seconds: float
    pull_timeout_seconds: float
    total_timeout_seconds: float
    stop_signal: str
    exclusive_cpus: bool
    open_files_limit: int
    read_bytes_per_second: int
    write_bytes_per_second: int
    gpu: GpuRequest
    disconnect_limit_seconds: float
    max_retries: int
    retry_own_failures: bool
    def __init__(self, task_id: _Optional[str] = ..., docker_image: _Optional[str] = ..., command: _Optional[str] = ..., req_cpu: _Optional[float] = ..., req_memory: _Optional[float] = ..., req_storage: _Optional[float] = ..., req_gpu: _Optional[float] = ..., target_worker_id: _Optional[str] = ..., user_id: _Optional[str] = ..., sla_multiplier: _Optional[float] = ..., task_type: _Optional[str] = ..., task_name: _Optional[str] = ..., submitted_at: _Optional[int] = ..., attempt: _Optional[int] = ..., argv: _Optional[_Iterable[str]] = ..., env: _Optional[_Iterable[_Union[EnvVar, _Mapping]]] = ..., timeout_seconds: _Optional[float] = ..., grace_seconds: _Optional[float] = ..., pull_policy: _Optional[str] = ..., cpu_milli: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., pids_limit: _Optional[int] = ..., wait_timeout_seconds: _Optional[float] = ..., pull_timeout_seconds: _Optional[float] = ..., total_timeout_seconds: _Optional[float] = ..., stop_signal: _Optional[str] = ..., exclusive_cpus: _Optional[bool] = ..., open_files_limit: _Optional[int] = ..., read_bytes_per_second: _Optional[int] = ..., write_bytes_per_second: _Optional[int] = ..., gpu: _Optional[_Union[GpuRequest, _Mapping]] = ..., disconnect_limit_seconds: _Optional[float] = ..., max_retries: _Optional[int] = ..., retry_own_failures: _Optional[bool] = ...) -> None: ...

class TaskResult(_message.Message):
    __slots__ = ("task_id", "worker_id", "status", "logs", "result_location", "output_files", "attempt", "outcome", "reason", "message", "exit_code", "image_digest", "trace_id", "phases", "limits_json", "usage", "manifest_sha256", "remarks", "gpu_uuids", "retryable", "gpu_part")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LOGS_FIELD_NUMBER: _ClassVar[int]
    RESULT_LOCATION_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FILES_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_JSON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    REMARKS_FIELD_NUMBER: _ClassVar[int]
    GPU_UUIDS_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    GPU_PART_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    worker_id: str
    status: str
    logs: str
    result_location: str
    output_files: _containers.RepeatedScalarFieldContainer[str]
    attempt: int
    outcome: str
    reason: str
    message: str
    exit_code: int
    image_digest: str
    trace_id: str
    phases: _containers.RepeatedCompositeFieldContainer[PhaseTiming]
    limits_json: str
    usage: Usage
    manifest_sha256: str
    remarks: _containers.RepeatedScalarFieldContainer[str]
    gpu_uuids: _containers.RepeatedScalarFieldContainer[str]
    retryable: bool
    gpu_part: GpuPart
    def __init__(self, task_id: _Optional[str] = ..., worker_id: _Optional[str] = ..., status: _Optional[str] = ..., logs: _Optional[str] = ..., result_location: _Optional[str] = ..., output_files: _Optional[_Iterable[str]] = ..., attempt: _Optional[int] = ..., outcome: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., exit_code: _Optional[int] = ..., image_digest: _Optional[str] = ..., trace_id: _Optional[str] = ..., phases: _Optional[_Iterable[_Union[PhaseTiming, _Mapping]]] = ..., limits_json: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., manifest_sha256: _Optional[str] = ..., remarks: _Optional[_Iterable[str]] = ..., gpu_uuids: _Optional[_Iterable[str]] = ..., retryable: _Optional[bool] = ..., gpu_part: _Optional[_Union[GpuPart, _Mapping]] = ...) -> None: ...

class PhaseTiming(_message.Message):
    __slots__ = ("name", "started_at_unix_ns", "duration_ns")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    name: str
    started_at_unix_ns: int
    duration_ns: int
    def __init__(self, name: _Optional[str] = ..., started_at_unix_ns: _Optional[int] = ..., duration_ns: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("memory_peak_bytes", "cpu_seconds", "log_bytes", "result_bytes", "result_file_count", "pids_peak_count", "cpu_throttled_seconds", "oom_kill_count", "read_bytes", "written_bytes", "disk_peak_bytes", "network_received_bytes", "network_sent_bytes", "gpus")
    MEMORY_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESULT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESULT_FILE_COUNT_FIELD_NUMBER: _ClassVar[int]
    PIDS_PEAK_COUNT_FIELD_NUMBER: _ClassVar[int]
    CPU_THROTTLED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OOM_KILL_COUNT_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NETWORK_RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NETWORK_SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    memory_peak_bytes: int
    cpu_seconds: float
    log_bytes: int
    result_bytes: int
    result_file_count: int
    pids_peak_count: int
    cpu_throttled_seconds: float
    oom_kill_count: int
    read_bytes: int
    written_bytes: int
    disk_peak_bytes: int
    network_received_bytes: int
    network_sent_bytes: int
    gpus: _containers.RepeatedCompositeFieldContainer[GpuUsage]
    def __init__(self, memory_peak_bytes: _Optional[int] = ..., cpu_seconds: _Optional[float] = ..., log_bytes: _Optional[int] = ..., result_bytes: _Optional[int] = ..., result_file_count: _Optional[int] = ..., pids_peak_count: _Optional[int] = ..., cpu_throttled_seconds: _Optional[float] = ..., oom_kill_count: _Optional[int] = ..., read_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., disk_peak_bytes: _Optional[int] = ..., network_received_bytes: _Optional[int] = ..., network_sent_bytes: _Optional[int] = ..., gpus: _Optional[_Iterable[_Union[GpuUsage, _Mapping]]] = ...) -> None: ...

class TaskID(_message.Message):
    __slots__ = ("task_id", "attempt")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    attempt: int
    def __init__(self, task_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class TaskLogRequest(_message.Message):
    __slots__ = ("task_id", "user_id", "follow", "attempt")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    user_id: str
    follow: bool
    attempt: int
    def __init__(self, task_id: _Optional[str] = ..., user_id: _Optional[str] = ..., follow: _Optional[bool] = ..., attempt: _Optional[int] = ...) -> None: ...

class LogChunk(_message.Message):
    __slots__ = ("task_id", "content", "timestamp", "is_complete", "status", "notice")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    IS_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    content: str
    timestamp: str
    is_complete: bool
    status: str
    notice: str
    def __init__(self, task_id: _Optional[str] = ..., content: _Optional[str] = ..., timestamp: _Optional[str] = ..., is_complete: _Optional[bool] = ..., status: _Optional[str] = ..., notice: _Optional[str] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("task_id", "user_id", "task_name", "file_path", "data", "is_last_chunk", "is_last_file", "timestamp", "attempt", "worker_id")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_NAME_FIELD_NUMBER: _ClassVar[int]
    FILE_PATH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FILE_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    user_id: str
    task_name: str
    file_path: str
    data: bytes
    is_last_chunk: bool
    is_last_file: bool
    timestamp: int
    attempt: int
    worker_id: str
    def __init__(self, task_id: _Optional[str] = ..., user_id: _Optional[str] = ..., task_name: _Optional[str] = ..., file_path: _Optional[str] = ..., data: _Optional[bytes] = ..., is_last_chunk: _Optional[bool] = ..., is_last_file: _Optional[bool] = ..., timestamp: _Optional[int] = ..., attempt: _Optional[int] = ..., worker_id: _Optional[str] = ...) -> None: ...

class FileUploadAck(_message.Message):
    __slots__ = ("success", "message", "files_received")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FILES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    success: bool
    message: str
    files_received: int
    def __init__(self, success: _Optional[bool] = ..., message: _Optional[str] = ..., files_received: _Optional[int] = ...) -> None: ...

class SubmitAck(_message.Message):
    __slots__ = ("success", "message", "task_id", "reason")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    success: bool
    message: str
    task_id: str
    reason: str
    def __init__(self, success: _Optional[bool] = ..., message: _Optional[str] = ..., task_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ListTasksRequest(_message.Message):
    __slots__ = ("limit", "states", "worker_id", "since_unix_ms")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SINCE_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    limit: int
    states: _containers.RepeatedScalarFieldContainer[str]
    worker_id: str
    since_unix_ms: int
    def __init__(self, limit: _Optional[int] = ..., states: _Optional[_Iterable[str]] = ..., worker_id: _Optional[str] = ..., since_unix_ms: _Optional[int] = ...) -> None: ...

class TaskView(_message.Message):
    __slots__ = ("task", "state", "worker_id", "phase", "message", "result", "submitted_at_unix_ms", "assigned_at_unix_ms", "finished_at_unix_ms", "reason", "running", "attempts")
    TASK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    task: Task
    state: str
    worker_id: str
    phase: str
    message: str
    result: TaskResult
    submitted_at_unix_ms: int
    assigned_at_unix_ms: int
    finished_at_unix_ms: int
    reason: str
    running: RunningTask
    attempts: _containers.RepeatedCompositeFieldContainer[AttemptView]
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., state: _Optional[str] = ..., worker_id: _Optional[str] = ..., phase: _Optional[str] = ..., message: _Optional[str] = ..., result: _Optional[_Union[TaskResult, _Mapping]] = ..., submitted_at_unix_ms: _Optional[int] = ..., assigned_at_unix_ms: _Optional[int] = ..., finished_at_unix_ms: _Optional[int] = ..., reason: _Optional[str] = ..., running: _Optional[_Union[RunningTask, _Mapping]] = ..., attempts: _Optional[_Iterable[_Union[AttemptView, _Mapping]]] = ...) -> None: ...

class AttemptView(_message.Message):
    __slots__ = ("attempt", "state", "worker_id", "reason", "message", "queued_at_unix_ms", "assigned_at_unix_ms", "finished_at_unix_ms", "result_location", "exit_code", "late_outcome", "late_reason")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    RESULT_LOCATION_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    LATE_OUTCOME_FIELD_NUMBER: _ClassVar[int]
    LATE_REASON_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    state: str
    worker_id: str
    reason: str
    message: str
    queued_at_unix_ms: int
    assigned_at_unix_ms: int
    finished_at_unix_ms: int
    result_location: str
    exit_code: int
    late_outcome: str
    late_reason: str
    def __init__(self, attempt: _Optional[int] = ..., state: _Optional[str] = ..., worker_id: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., queued_at_unix_ms: _Optional[int] = ..., assigned_at_unix_ms: _Optional[int] = ..., finished_at_unix_ms: _Optional[int] = ..., result_location: _Optional[str] = ..., exit_code: _Optional[int] = ..., late_outcome: _Optional[str] = ..., late_reason: _Optional[str] = ...) -> None: ...

class TaskList(_message.Message):
    __slots__ = ("tasks",)
    TASKS_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[TaskView]
    def __init__(self, tasks: _Optional[_Iterable[_Union[TaskView, _Mapping]]] = ...) -> None: ...

class ListNodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeView(_message.Message):
    __slots__ = ("worker_id", "address", "state", "capacity", "allocatable", "assigned", "last_heartbeat_unix_ms", "cpu_usage_percent", "memory_usage_percent", "storage_usage_percent", "gpus", "running_tasks", "conditions", "warnings", "draining", "gpu_driver_version", "cuda_version", "node_version")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    ALLOCATABLE_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_FIELD_NUMBER: _ClassVar[int]
    LAST_HEARTBEAT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    CPU_USAGE_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USAGE_PERCENT_FIELD_NUMBER: _ClassVar[int]
    STORAGE_USAGE_PERCENT_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_TASKS_FIELD_NUMBER: _ClassVar[int]
    CONDITIONS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    GPU_DRIVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    CUDA_VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_VERSION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    state: str
    capacity: Resources
    allocatable: Resources
    assigned: Resources
    last_heartbeat_unix_ms: int
    cpu_usage_percent: float
    memory_usage_percent: float
    storage_usage_percent: float
    gpus: _containers.RepeatedCompositeFieldContainer[GpuInfo]
    running_tasks: _containers.RepeatedCompositeFieldContainer[RunningTask]
    conditions: _containers.RepeatedScalarFieldContainer[str]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    draining: bool
    gpu_driver_version: str
    cuda_version: str
    node_version: str
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., capacity: _Optional[_Union[Resources, _Mapping]] = ..., allocatable: _Optional[_Union[Resources, _Mapping]] = ..., assigned: _Optional[_Union[Resources, _Mapping]] = ..., last_heartbeat_unix_ms: _Optional[int] = ..., cpu_usage_percent: _Optional[float] = ..., memory_usage_percent: _Optional[float] = ..., storage_usage_percent: _Optional[float] = ..., gpus: _Optional[_Iterable[_Union[GpuInfo, _Mapping]]] = ..., running_tasks: _Optional[_Iterable[_Union[RunningTask, _Mapping]]] = ..., conditions: _Optional[_Iterable[str]] = ..., warnings: _Optional[_Iterable[str]] = ..., draining: _Optional[bool] = ..., gpu_driver_version: _Optional[str] = ..., cuda_version: _Optional[str] = ..., node_version: _Optional[str] = ...) -> None: ...

class NodeList(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeView]
    def __init__(self, nodes: _Optional[_Iterable[_Union[NodeView, _Mapping]]] = ...) -> None: ...
