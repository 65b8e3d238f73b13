/* The part of NVML's binary interface that the false driver speaks.
 *
 * Numbers and layouts are those of nvml.h (NVML API reference, version 13), on a 64-bit machine. The assertions hold the layouts to
 * the documented ones; tests hold them to the structures of the Python binding as well. NVML has no ELF symbol versions: "_v2" and
 * "_v3" are plain parts of names.
 */
#ifndef FALSE_DRIVER_ABI_H
#define FALSE_DRIVER_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
	SUCCESS = 0,
	UNINITIALIZED = 1,
	INVALID_ARGUMENT = 2,
	NOT_SUPPORTED = 3,
	NO_PERMISSION = 4,
	NOT_FOUND = 6,
	INSUFFICIENT_SIZE = 7,
	DRIVER_NOT_LOADED = 9,
	TIMEOUT = 10,
	GPU_IS_LOST = 15,
	INSUFFICIENT_RESOURCES = 23,
	ARGUMENT_VERSION_MISMATCH = 25,
	UNKNOWN_ERROR = 999,
} nvml_code;

typedef struct handle *nvml_device;
typedef struct event_set *nvml_event_set;

/* "Not available" and "any instance", in fields of 64 and of 32 bits. */
#define NOT_AVAILABLE UINT64_MAX
#define NO_INSTANCE UINT32_MAX

/* Structures with a version carry size | number << 24 in their first word, and NVML refuses any other. */
#define STRUCT_VERSION(type, number) ((uint32_t)(sizeof(type) | ((uint32_t)(number) << 24)))

typedef struct {
	char bus_id_legacy[16]; /* domain of 4 digits */
	uint32_t domain, bus, device, device_id, subsystem_id;
	char bus_id[32]; /* domain of 8 digits */
} pci_info;
_Static_assert(sizeof(pci_info) == 68, "nvmlPciInfo_t");

typedef struct {
	uint64_t total, free, used; /* used includes what the driver reserves */
} memory_v1;
_Static_assert(sizeof(memory_v1) == 24, "nvmlMemory_t");

typedef struct {
	uint32_t version;
	uint64_t total, reserved, free, used; /* used is without reserved: the four add up */
} memory_v2;
_Static_assert(sizeof(memory_v2) == 40 && offsetof(memory_v2, total) == 8, "nvmlMemory_v2_t");
_Static_assert(STRUCT_VERSION(memory_v2, 2) == 0x02000028, "nvmlMemory_v2");

typedef struct {
	uint32_t gpu, memory;
} utilization;
_Static_assert(sizeof(utilization) == 8, "nvmlUtilization_t");

typedef struct {
	uint32_t version, sensor;
	int32_t celsius;
} temperature_v1;
_Static_assert(STRUCT_VERSION(temperature_v1, 1) == 0x0100000C, "nvmlTemperature_v1");

/* Versions 2 and 3 of the process calls share it. */
typedef struct {
	uint32_t pid;
	uint64_t used_bytes;
	uint32_t gpu_instance, compute_instance;
} process_info;
_Static_assert(sizeof(process_info) == 24 && offsetof(process_info, used_bytes) == 8, "nvmlProcessInfo_v2_t");

typedef struct {
	uint32_t pid;
	uint64_t at_microseconds;
	uint32_t sm, memory, encoder, decoder;
} process_sample;
_Static_assert(sizeof(process_sample) == 32, "nvmlProcessUtilizationSample_t");

typedef struct {
	uint32_t gpu_percent, memory_percent;
	uint64_t peak_bytes, time_milliseconds, started_microseconds;
	uint32_t is_running, reserved[5];
} accounting_stats;
_Static_assert(sizeof(accounting_stats) == 56 && offsetof(accounting_stats, is_running) == 32, "nvmlAccountingStats_t");

typedef struct {
	nvml_device device;
	uint64_t type, data;
	uint32_t gpu_instance, compute_instance;
} event_data;
_Static_assert(sizeof(event_data) == 32 && offsetof(event_data, gpu_instance) == 24, "nvmlEventData_t");

typedef union {
	double real;
	uint32_t u32;
	uint64_t u64;
	int32_t i32;
} field_number;

typedef struct {
	uint32_t field, scope;
	int64_t at_microseconds, latency_microseconds;
	uint32_t type;
	int32_t code;
	field_number value;
} field_value;
_Static_assert(sizeof(field_value) == 40 && offsetof(field_value, code) == 28, "nvmlFieldValue_t");

typedef struct {
	uint32_t multiprocessors, copy_engines, decoders, encoders, jpegs, ofas, gpu_slices, compute_slices;
	uint64_t memory_mib;
} mig_attributes;
_Static_assert(sizeof(mig_attributes) == 40, "nvmlDeviceAttributes_t");

typedef struct {
	uint32_t version;
	uint8_t cluster_uuid[16];
	int32_t status;
	uint32_t clique, state, health_mask;
} fabric_v2;
_Static_assert(STRUCT_VERSION(fabric_v2, 2) == 0x02000024, "nvmlGpuFabricInfo_v2");

typedef struct {
	fabric_v2 v2;
	uint8_t health_summary;
} fabric_v3;
_Static_assert(STRUCT_VERSION(fabric_v3, 3) == 0x03000028, "nvmlGpuFabricInfo_v3");

/* Since R615. No version word: the function's name has it. */
typedef struct {
	const char *cgroup;
	uint64_t soft_bytes, hard_bytes;
} set_memory_limits;
_Static_assert(sizeof(set_memory_limits) == 24, "nvmlSetMemoryLimits_v1_t");

typedef struct {
	const char *cgroup;
	uint64_t soft_bytes, hard_bytes, used_bytes;
} get_memory_limits;
_Static_assert(sizeof(get_memory_limits) == 32, "nvmlGetMemoryLimits_v1_t");

#define EVENT_XID UINT64_C(0x8)
/* Every type that some version of nvml.h names; anything else is an invalid argument. */
#define EVENTS_KNOWN UINT64_C(0xFF9F)

enum { TEMPERATURE_GPU = 0 };
enum { ECC_CORRECTED = 0, ECC_UNCORRECTED = 1 };
enum { ECC_VOLATILE = 0, ECC_AGGREGATE = 1 };
enum { TOPOLOGY_INTERNAL = 0, TOPOLOGY_SINGLE = 10, TOPOLOGY_NODE = 40, TOPOLOGY_SYSTEM = 50 };
enum { P2P_READ = 0, P2P_WRITE = 1, P2P_NVLINK = 2, P2P_ATOMICS = 3, P2P_PCI = 4, P2P_INDEX_COUNT = 5 };
enum { P2P_OK = 0, P2P_CHIPSET_NOT_SUPPORTED = 1, P2P_NOT_SUPPORTED = 5 };
enum { LINK_TO_GPU = 0, LINK_TO_SWITCH = 2, LINK_TO_UNKNOWN = 0xFF };
enum { FABRIC_NOT_SUPPORTED = 0, FABRIC_NOT_STARTED = 1, FABRIC_IN_PROGRESS = 2, FABRIC_COMPLETED = 3 };
enum { VALUE_U32 = 1, VALUE_U64 = 3 };

#endif
