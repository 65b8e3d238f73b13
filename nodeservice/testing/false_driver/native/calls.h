/* What every call of the library begins with: the lock, the state as it is now, and the faults that the state orders. */
#ifndef FALSE_DRIVER_CALLS_H
#define FALSE_DRIVER_CALLS_H

#include "state.h"

/* The library's lock is held from call_begin to call_end, so a call sees one state from its beginning to its end. */
struct call {
	const char *name;
	nvml_code code;
};
struct call call_begin(const char *name);
void call_end(struct call *call);

/* Init and shutdown, which may be called when NVML is not initialised. */
struct call call_begin_uninitialized(const char *name);
extern unsigned init_count;

/* What a handle stands for. mig is NULL for a whole GPU. */
struct target {
	const struct gpu *gpu;
	const struct mig *mig;
};
nvml_code find_target(const char *call, nvml_device device, struct target *target);
nvml_code give_handle(const struct gpu *gpu, const struct mig *mig, nvml_device *device);

/* Sleep for less than a person notices: between two looks at the state. */
void nap(void);
double seconds_now(void);

/* A whole GPU with MIG on tells what belongs to all its instances only to the privileged. */
int is_privileged(void);

/* Return from the function with the call's error, if it has one. `call` ends with its scope. */
#define CALL() \
	__attribute__((cleanup(call_end))) struct call call = call_begin(__func__); \
	if (call.code != SUCCESS) \
	return call.code

#define CALL_ON(device) \
	CALL(); \
	struct target on; \
	if ((call.code = find_target(__func__, (device), &on)) != SUCCESS) \
	return call.code

/* For what NVML tells of whole GPUs only. Which error a MIG handle gets there is not documented; "not supported" is what fits. */
#define CALL_ON_GPU(device) \
	CALL_ON(device); \
	if (on.mig) \
	return NOT_SUPPORTED

/* Answer with a fact, or with "not supported" where the device does not tell it. */
#define TELL(out, fact) \
	do { \
		uint64_t told_ = (fact); \
		if (!(out)) \
			return INVALID_ARGUMENT; \
		if (told_ == NOT_AVAILABLE) \
			return NOT_SUPPORTED; \
		*(out) = (__typeof__(*(out)))told_; \
		return SUCCESS; \
	} while (0)

nvml_code tell_text(char *out, unsigned length, const char *text);

#endif
