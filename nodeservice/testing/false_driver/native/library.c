/* The library itself: init and shutdown, its versions, and its errors in words. */
#include "calls.h"

#include <stdio.h>
#include <string.h>

/* NVML counts: it works from the first init until as many shutdowns. Init does not touch the GPUs. */
nvml_code nvmlInitWithFlags(unsigned flags)
{
	__attribute__((cleanup(call_end))) struct call call = call_begin_uninitialized(__func__);
	(void)flags;
	if (call.code == SUCCESS && state.init_error != 0)
		call.code = (nvml_code)state.init_error;
	if (call.code == SUCCESS)
		init_count++;
	return call.code;
}

nvml_code nvmlInit_v2(void)
{
	return nvmlInitWithFlags(0);
}

nvml_code nvmlInit(void)
{
	return nvmlInitWithFlags(0);
}

nvml_code nvmlShutdown(void)
{
	CALL();
	if (--init_count == 0)
		state_forget();
	return SUCCESS;
}

const char *nvmlErrorString(nvml_code code)
{
	static const char *const words[] = {
		"Success", "Uninitialized", "Invalid Argument", "Not Supported", "Insufficient Permissions", "Already Initialized",
		"Not Found", "Insufficient Size", "Insufficient External Power", "Driver Not Loaded", "Timeout",
		"Interrupt Request Issue", "NVML Shared Library Not Found", "Function Not Found", "Corrupted infoROM", "GPU is lost",
		"GPU requires reset", "GPU access blocked by the operating system", "Driver/library version mismatch", "In use by another client",
		"Insufficient Memory", "No data", "vGPU ECC not supported", "Insufficient resources", "Frequency not supported",
		"Argument version mismatch", "Deprecated", "System is not in ready state", "GPU not found", "Invalid state",
	};
	return (unsigned)code < sizeof(words) / sizeof(*words) ? words[code] : "Unknown Error";
}

nvml_code nvmlSystemGetDriverVersion(char *version, unsigned length)
{
	CALL();
	return tell_text(version, length, state.version);
}

nvml_code nvmlSystemGetNVMLVersion(char *version, unsigned length)
{
	CALL();
	return tell_text(version, length, state.nvml_version);
}

/* 1000 × major + 10 × minor. Works without init, as libcuda alone is asked. */
nvml_code nvmlSystemGetCudaDriverVersion_v2(int *version)
{
	__attribute__((cleanup(call_end))) struct call call = call_begin_uninitialized(__func__);
	if (call.code != SUCCESS)
		return call.code;
	TELL(version, state.cuda_version);
}

nvml_code nvmlSystemGetCudaDriverVersion(int *version)
{
	return nvmlSystemGetCudaDriverVersion_v2(version);
}

/* No function of NVIDIA's: whoever finds it knows that all answers are pretended. */
nvml_code nvmlFalseDriverMachine(char *machine, unsigned length)
{
	__attribute__((cleanup(call_end))) struct call call = call_begin_uninitialized(__func__);
	return tell_text(machine, length, call.code == SUCCESS ? state.machine : "");
}
