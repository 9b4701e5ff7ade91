"""A file system without locks, links, modes and syncing of folders, as NFS, SMB, FUSE and CI mounts may be."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = shutil.which("cc") or shutil.which("gcc")
with_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
# Below the folder POOR these calls fail as such file systems let them fail; LOCKS is what flock says.
SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
static int below(const char *path) { return !strncmp(path, getenv("POOR"), strlen(getenv("POOR"))); }
static int poor(int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}
static int fail(int error) { errno = error; return -1; }
int flock(int file, int how) { return poor(file) ? fail(atoi(getenv("LOCKS"))) : REAL(flock)(file, how); }
int fsync(int file) {
    struct stat is;
    return poor(file) && !fstat(file, &is) && S_ISDIR(is.st_mode) ? fail(EINVAL) : REAL(fsync)(file);
}
int symlink(const char *to, const char *path) { return below(path) ? fail(EPERM) : REAL(symlink)(to, path); }
int link(const char *to, const char *path) { return below(path) ? fail(EPERM) : REAL(link)(to, path); }
int chmod(const char *path, mode_t mode) { return below(path) ? fail(EPERM) : REAL(chmod)(path, mode); }
"""


def poor_file_system(tools: Path, folder: Path, locks: int) -> dict[str, str]:
    """The environment in which `folder` is on such a file system, whose locks fail with the error number `locks`."""
    assert COMPILER
    (tools / "poor.c").write_text(SOURCE)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", tools / "poor.so", tools / "poor.c", "-ldl"], check=True)
    return os.environ | {"LD_PRELOAD": str(tools / "poor.so"), "POOR": str(folder), "LOCKS": str(locks)}
