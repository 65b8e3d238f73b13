/* Finds out when the state file is another than before, and adds to it what a caller sets. */
#include "state.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

/* The file last read stays open: no other file can have its inode number meanwhile, so a new number means a new file. */
static int seen_file = -1;
static struct stat seen;

nvml_code state_refresh(void)
{
	const char *path = getenv(STATE_VARIABLE);
	struct stat now;
	if (!path || stat(path, &now) != 0)
		return DRIVER_NOT_LOADED;
	if (seen_file >= 0 && now.st_ino == seen.st_ino && now.st_dev == seen.st_dev && now.st_size == seen.st_size &&
	    now.st_mtim.tv_sec == seen.st_mtim.tv_sec && now.st_mtim.tv_nsec == seen.st_mtim.tv_nsec)
		return SUCCESS;
	int opened = open(path, O_RDONLY | O_CLOEXEC);
	if (opened < 0)
		return DRIVER_NOT_LOADED;
	int kept = fcntl(opened, F_DUPFD_CLOEXEC, 0);
	FILE *file = fdopen(opened, "r");
	if (kept < 0 || !file || fstat(kept, &now) != 0) {
		file ? fclose(file) : close(opened);
		if (kept >= 0)
			close(kept);
		return UNKNOWN_ERROR;
	}
	state_read(file);
	fclose(file);
	state_forget();
	seen_file = kept;
	seen = now;
	return SUCCESS;
}

void state_forget(void)
{
	if (seen_file >= 0)
		close(seen_file);
	seen_file = -1;
}

static int copy(FILE *from, FILE *to)
{
	char bytes[4096];
	size_t count;
	while ((count = fread(bytes, 1, sizeof(bytes), from)) > 0)
		if (fwrite(bytes, 1, count, to) != count)
			return -1;
	return ferror(from) ? -1 : 0;
}

/* A copy with the section at its end takes the file's place, so that a reader never sees half. driver.py takes the same lock. */
nvml_code state_add(const char *head, const char *body)
{
	const char *path = getenv(STATE_VARIABLE);
	char lock_path[PATH_SIZE], new_path[PATH_SIZE];
	if (!path)
		return UNKNOWN_ERROR;
	snprintf(lock_path, sizeof(lock_path), "%s.lock", path);
	snprintf(new_path, sizeof(new_path), "%s.new", path);
	int lock = open(lock_path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
	if (lock < 0 || flock(lock, LOCK_EX) != 0) {
		if (lock >= 0)
			close(lock);
		return UNKNOWN_ERROR;
	}
	FILE *from = fopen(path, "re"), *to = fopen(new_path, "we");
	int failed = !from || !to || copy(from, to) != 0 || fprintf(to, "[%s]\n%s\n", head, body) < 0;
	if (from)
		fclose(from);
	if (to && fclose(to) != 0)
		failed = 1;
	if (!failed)
		failed = rename(new_path, path) != 0;
	close(lock);
	return failed ? UNKNOWN_ERROR : state_refresh();
}
