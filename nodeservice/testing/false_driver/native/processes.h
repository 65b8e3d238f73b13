/* Who uses a device, and with how much memory. */
#ifndef FALSE_DRIVER_PROCESSES_H
#define FALSE_DRIVER_PROCESSES_H

#include "calls.h"

/* Memory of all processes on the device; those on the MIG devices of a GPU are on that GPU. */
uint64_t bytes_of_processes(const struct target *on);

/* Where cgroup v2 may be mounted: here the first is of the hybrid layout. A process's cgroup has one directory in each. */
enum { CGROUP_MOUNTS = 2 };
/* Whether the process is in the cgroup of this directory, or in one below it. */
int is_in_cgroup(const struct process *process, const char *directory);
int cgroup_directory(uint32_t pid, size_t mount, char directory[PATH_SIZE]);
int is_on(const struct process *process, const struct target *on);
int is_here(const struct process *process);

#endif
