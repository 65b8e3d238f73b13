/* The pretended machine, as the state file tells it. driver.py writes the file and describes its form. */
#ifndef FALSE_DRIVER_STATE_H
#define FALSE_DRIVER_STATE_H

#include "abi.h"

#include <stdio.h>

/* The variable that names the state file. Without it the driver is not loaded. */
#define STATE_VARIABLE "FALSE_NVIDIA_DRIVER"

enum { MAX_GPUS = 32, MAX_MIGS = 7 * MAX_GPUS, MAX_LINKS = 18, MAX_PROCESSES = 1024, MAX_EVENTS = 1024, MAX_FAILURES = 64, MAX_LIMITS = 256 };
enum { UUID_SIZE = 96, NAME_SIZE = 96, BUS_ID_SIZE = 32, CALL_SIZE = 64, PATH_SIZE = 512 };

/* Facts of one GPU that are numbers. One that the file leaves out is NOT_AVAILABLE: the call that asks for it is not supported. */
#define GPU_FACTS(X) \
	X(minor) X(brand) X(architecture) X(cuda_major) X(cuda_minor) X(pci_device_id) X(pci_subsystem_id) X(numa_node) \
	X(memory_total_bytes) X(memory_reserved_bytes) X(memory_used_bytes) \
	X(utilization_percent) X(memory_utilization_percent) \
	X(power_milliwatts) X(power_limit_milliwatts) X(energy_millijoules) X(temperature_celsius) X(throttle_reasons) \
	X(ecc_enabled) X(ecc_corrected) X(ecc_uncorrected) X(ecc_corrected_before) X(ecc_uncorrected_before) \
	X(remapped_corrected) X(remapped_uncorrected) X(remapped_pending) X(remapped_failure) X(retired_pending) \
	X(recovery_action) X(supported_events) X(fabric_state) \
	X(compute_mode) X(accounting_mode) X(persistence_mode) \
	X(mig_max_count) X(mig_enabled) X(mig_pending) \
	X(lost) X(denied)

struct link {
	int exists, active;
	uint32_t remote_type;
	char remote_bus_id[BUS_ID_SIZE];
};

struct gpu {
	char uuid[UUID_SIZE], name[NAME_SIZE], bus_id[BUS_ID_SIZE], serial[32], pcie_switch[64], cpus[256];
	struct link links[MAX_LINKS];
#define X(fact) uint64_t fact;
	GPU_FACTS(X)
#undef X
};

#define MIG_FACTS(X) \
	X(index) X(gpu_instance) X(compute_instance) X(memory_total_bytes) X(memory_reserved_bytes) X(memory_used_bytes) \
	X(multiprocessors) X(copy_engines) X(decoders) X(encoders) X(jpegs) X(ofas) X(gpu_slices) X(compute_slices)

struct mig {
	char uuid[UUID_SIZE], gpu[UUID_SIZE], profile[32];
#define X(fact) uint64_t fact;
	MIG_FACTS(X)
#undef X
};

/* start_ticks, field 22 of /proc/PID/stat: with it, the process is here only while that very process lives. */
#define PROCESS_FACTS(X) \
	X(used_bytes) X(sm_percent) X(memory_percent) X(start_ticks) \
	X(accounted) X(ended) X(peak_bytes) X(started_microseconds) X(ended_microseconds)

struct process {
	char device[UUID_SIZE], kind[16], cgroup[PATH_SIZE];
	uint32_t pid;
#define X(fact) uint64_t fact;
	PROCESS_FACTS(X)
#undef X
};

#define EVENT_FACTS(X) X(type) X(data) X(gpu_instance) X(compute_instance)

struct event {
	uint64_t number; /* rises by one with each event */
	char gpu[UUID_SIZE];
#define X(fact) uint64_t fact;
	EVENT_FACTS(X)
#undef X
};

struct failure {
	char call[CALL_SIZE], device[UUID_SIZE]; /* device is empty: on every device */
	uint64_t code;
};

struct memory_limit {
	char gpu[UUID_SIZE], cgroup[PATH_SIZE];
	uint64_t soft_bytes, hard_bytes;
};

struct state {
	char machine[64], version[80], nvml_version[80];
	uint64_t cuda_version, init_error, pid_namespace;
	double hang_seconds;
	char hang_calls[512];
	struct gpu gpus[MAX_GPUS];
	struct mig migs[MAX_MIGS];
	struct process processes[MAX_PROCESSES];
	struct event events[MAX_EVENTS];
	struct failure failures[MAX_FAILURES];
	struct memory_limit limits[MAX_LIMITS];
	size_t gpu_count, mig_count, process_count, event_count, failure_count, limit_count;
};

/* The state as of the last refresh. Only for a thread that holds the library's lock. */
extern struct state state;

/* Replace the state by what the text says. */
void state_read(FILE *file);

/* Read the file again if it is another than last time. DRIVER_NOT_LOADED where there is none. */
nvml_code state_refresh(void);

/* Let the file go. */
void state_forget(void);

/* Add a section to the file, as the driver's own doing, for all processes to see: "[head]\nbody". */
nvml_code state_add(const char *head, const char *body);

const struct gpu *gpu_by_uuid(const char *uuid);
const struct mig *mig_by_uuid(const char *uuid);
const struct mig *mig_at(const struct gpu *gpu, uint64_t index);

#endif
