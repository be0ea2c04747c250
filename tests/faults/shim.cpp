// A library for LD_PRELOAD that lets calls on some files fail, or kills the process in them.
//
// FAULTS, or the argument of faults_arm, is "CALLS ACTION AFTER PATH":
//   CALLS   read, write, sync, rename, or change, which is whatever changes a file or a name
//   ACTION  the errno with which they fail, or kill or killed for a kill before or after the call
//   AFTER   so many calls go well before; with an errno of a full disk it is bytes that are still written
//   PATH    a text that the path of the file contains
// Nothing fails where ACTION is 0, but calls are counted; faults_count says how many there were. Where the variable
// WITHOUT_RENAMEAT2 or faults_without_renameat2 says so, the system does not know that call.

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

enum Kind { READ = 1, WRITE = 2, SYNC = 4, RENAME = 8, NAME = 16, CHANGE = WRITE | SYNC | RENAME | NAME };
enum Action { FAIL, KILL_BEFORE, KILL_AFTER };

struct Plan {
  int kinds = 0;
  Action action = FAIL;
  int error = 0;
  long after = 0;
  char path[PATH_MAX] = "";
};

Plan plan;
bool without_renameat2 = false;
long* seen = nullptr;  // calls or bytes, shared with forks

bool of_disk_space(int error) { return error == ENOSPC || error == EDQUOT; }

int kinds_of(const char* name) {
  const struct {
    const char* name;
    int kinds;
  } known[] = {{"read", READ}, {"write", WRITE}, {"sync", SYNC}, {"rename", RENAME}, {"change", CHANGE}};
  for (const auto& each : known)
    if (!strcmp(each.name, name)) return each.kinds;
  return 0;
}

bool concerns(Kind kind, const char* path) { return (plan.kinds & kind) && path && strstr(path, plan.path); }

bool concerns(Kind kind, int fd) {
  if (!(plan.kinds & kind)) return false;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t size = readlink(link, path, sizeof path - 1);
  if (size <= 0) return false;
  path[size] = 0;
  return path[0] == '/' && strstr(path, plan.path);
}

// Returns whether this call should fail; kills the process if it should die before it.
bool fails() {
  const long number = __atomic_fetch_add(seen, 1, __ATOMIC_SEQ_CST);
  if (plan.action == KILL_BEFORE && number == plan.after) kill(getpid(), SIGKILL);
  if (plan.action != FAIL || !plan.error || number < plan.after) return false;
  errno = plan.error;
  return true;
}

void done() {
  if (plan.action == KILL_AFTER && *seen == plan.after + 1) kill(getpid(), SIGKILL);
}

// Returns how many of `wanted` bytes a disk that fills up takes; 0 with errno if none.
size_t room(size_t wanted) {
  const long before = __atomic_fetch_add(seen, long(wanted), __ATOMIC_SEQ_CST);
  if (before + long(wanted) <= plan.after) return wanted;
  const long left = std::max(0L, plan.after - before);
  __atomic_store_n(seen, std::max(plan.after, before), __ATOMIC_SEQ_CST);
  if (left == 0) errno = plan.error;
  return size_t(left);
}

template <typename F>
F real(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

template <typename Call>
auto guarded(bool concerned, Call call) -> decltype(call()) {
  if (!concerned) return call();
  if (fails()) return -1;
  const auto result = call();
  const int error = errno;
  done();
  errno = error;
  return result;
}

template <typename Call>
ssize_t written(int fd, size_t size, Call call) {
  if (!concerns(WRITE, fd)) return call(size);
  if (plan.action == FAIL && of_disk_space(plan.error)) {
    const size_t taken = size ? room(size) : 0;
    return size && !taken ? -1 : call(taken);
  }
  return guarded(true, [&] { return call(size); });
}

}  // namespace

extern "C" {

void faults_arm(const char* text) {
  if (!seen)
    seen = static_cast<long*>(mmap(nullptr, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  plan = Plan();
  *seen = 0;
  char kinds[16] = "", action[16] = "";
  Plan next;
  if (!text || sscanf(text, "%15s %15s %ld %4095[^\n]", kinds, action, &next.after, next.path) < 4) return;
  next.action = !strcmp(action, "kill") ? KILL_BEFORE : !strcmp(action, "killed") ? KILL_AFTER : FAIL;
  next.error = next.action == FAIL ? atoi(action) : 0;
  next.kinds = kinds_of(kinds);
  plan = next;
}

long faults_count() { return *seen; }

void faults_without_renameat2() { without_renameat2 = true; }

__attribute__((constructor)) static void begin() {
  faults_arm(getenv("FAULTS"));
  without_renameat2 = getenv("WITHOUT_RENAMEAT2") != nullptr;
}

ssize_t read(int fd, void* into, size_t size) {
  static const auto call = real<ssize_t (*)(int, void*, size_t)>("read");
  return guarded(concerns(READ, fd), [&] { return call(fd, into, size); });
}

#define PREAD(name)                                                               \
  ssize_t name(int fd, void* into, size_t size, off_t at) {                       \
    static const auto call = real<ssize_t (*)(int, void*, size_t, off_t)>(#name); \
    return guarded(concerns(READ, fd), [&] { return call(fd, into, size, at); }); \
  }
PREAD(pread)
PREAD(pread64)

#define PREADV(name)                                                                         \
  ssize_t name(int fd, const struct iovec* into, int count, off_t at) {                      \
    static const auto call = real<ssize_t (*)(int, const struct iovec*, int, off_t)>(#name); \
    return guarded(concerns(READ, fd), [&] { return call(fd, into, count, at); });           \
  }
PREADV(preadv)
PREADV(preadv64)

#define PREADV2(name)                                                                             \
  ssize_t name(int fd, const struct iovec* into, int count, off_t at, int flags) {                \
    static const auto call = real<ssize_t (*)(int, const struct iovec*, int, off_t, int)>(#name); \
    return guarded(concerns(READ, fd), [&] { return call(fd, into, count, at, flags); });         \
  }
PREADV2(preadv2)
PREADV2(preadv64v2)

ssize_t write(int fd, const void* from, size_t size) {
  static const auto call = real<ssize_t (*)(int, const void*, size_t)>("write");
  return written(fd, size, [&](size_t taken) { return call(fd, from, taken); });
}

#define PWRITE(name)                                                                    \
  ssize_t name(int fd, const void* from, size_t size, off_t at) {                       \
    static const auto call = real<ssize_t (*)(int, const void*, size_t, off_t)>(#name); \
    return written(fd, size, [&](size_t taken) { return call(fd, from, taken, at); });  \
  }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int fd, const struct iovec* from, int count) {
  if (count > 0) return write(fd, from[0].iov_base, from[0].iov_len);
  return 0;
}

#define ALLOCATE(name)                                                                        \
  int name(int fd, off_t at, off_t size) {                                                    \
    static const auto call = real<int (*)(int, off_t, off_t)>(#name);                         \
    const ssize_t taken = written(fd, size_t(size), [](size_t all) { return ssize_t(all); }); \
    return taken == ssize_t(size) ? call(fd, at, size) : plan.error;                          \
  }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

#define SYNC_CALL(name)                                           \
  int name(int fd) {                                              \
    static const auto call = real<int (*)(int)>(#name);           \
    return guarded(concerns(SYNC, fd), [&] { return call(fd); }); \
  }
SYNC_CALL(fsync)
SYNC_CALL(fdatasync)

#define TRUNCATE(name)                                                  \
  int name(int fd, off_t size) {                                        \
    static const auto call = real<int (*)(int, off_t)>(#name);          \
    return guarded(concerns(NAME, fd), [&] { return call(fd, size); }); \
  }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

int rename(const char* from, const char* to) {
  static const auto call = real<int (*)(const char*, const char*)>("rename");
  return guarded(concerns(RENAME, from) || concerns(RENAME, to), [&] { return call(from, to); });
}

int renameat(int a, const char* from, int b, const char* to) {
  static const auto call = real<int (*)(int, const char*, int, const char*)>("renameat");
  return guarded(concerns(RENAME, from) || concerns(RENAME, to), [&] { return call(a, from, b, to); });
}

int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
  if (without_renameat2) {
    errno = ENOSYS;
    return -1;
  }
  static const auto call = real<int (*)(int, const char*, int, const char*, unsigned)>("renameat2");
  return guarded(concerns(RENAME, from) || concerns(RENAME, to), [&] { return call(a, from, b, to, flags); });
}

int unlink(const char* path) {
  static const auto call = real<int (*)(const char*)>("unlink");
  return guarded(concerns(NAME, path), [&] { return call(path); });
}

int rmdir(const char* path) {
  static const auto call = real<int (*)(const char*)>("rmdir");
  return guarded(concerns(NAME, path), [&] { return call(path); });
}

int mkdir(const char* path, mode_t mode) {
  static const auto call = real<int (*)(const char*, mode_t)>("mkdir");
  return guarded(concerns(NAME, path), [&] { return call(path, mode); });
}

#define OPEN(name)                                                                                      \
  int name(const char* path, int flags, ...) {                                                          \
    static const auto call = real<int (*)(const char*, int, mode_t)>(#name);                            \
    va_list rest;                                                                                       \
    va_start(rest, flags);                                                                              \
    const bool makes = (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE;                           \
    const mode_t mode = makes ? va_arg(rest, mode_t) : 0;                                               \
    va_end(rest);                                                                                       \
    return guarded((flags & O_CREAT) && concerns(NAME, path), [&] { return call(path, flags, mode); }); \
  }
OPEN(open)
OPEN(open64)
}
