/* Memory limits of cgroups, and what is used under them. */
#ifndef FALSE_DRIVER_LIMITS_H
#define FALSE_DRIVER_LIMITS_H

#include "calls.h"

/* The limit that holds in this cgroup, a directory; NULL where none does. */
const struct memory_limit *limit_of(const struct gpu *gpu, const char *cgroup);
const struct memory_limit *limit_of_caller(const struct gpu *gpu);
uint64_t bytes_in(const struct target *on, const char *cgroup);

#endif
