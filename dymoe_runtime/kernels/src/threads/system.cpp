#include "threads/system.h"

#include <errno.h>
#include <sys/stat.h>

#if defined(_WIN32)
#include <io.h>
#include <process.h>
#include <windows.h>
#else
#include <sys/uio.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#endif

namespace dymoe {

#if defined(_WIN32)

int64_t read_at(int fd, const std::vector<Span>& spans, int64_t offset) {
  OVERLAPPED where{};
  where.Offset = DWORD(uint64_t(offset)), where.OffsetHigh = DWORD(uint64_t(offset) >> 32);
  DWORD count = 0;
  const auto file = reinterpret_cast<HANDLE>(_get_osfhandle(fd));
  if (ReadFile(file, spans[0].data, DWORD(spans[0].nbytes), &count, &where)) return count;
  const DWORD reason = GetLastError();
  if (reason == ERROR_HANDLE_EOF) return 0;
  errno = reason == ERROR_INVALID_HANDLE || reason == ERROR_ACCESS_DENIED ? EBADF : EIO;
  return -1;
}

bool ends_before(int fd, int64_t offset) {
  const int64_t size = _filelengthi64(fd);
  return size >= 0 && size <= offset;
}

int64_t process_id() { return _getpid(); }

#else

int64_t read_at(int fd, const std::vector<Span>& spans, int64_t offset) {
#if defined(__linux__)
  std::vector<iovec> places;
  for (const Span& span : spans) places.push_back({span.data, size_t(span.nbytes)});
  return preadv(fd, places.data(), int(places.size()), off_t(offset));
#else
  return pread(fd, spans[0].data, size_t(spans[0].nbytes), off_t(offset));
#endif
}

bool ends_before(int fd, int64_t offset) {
  struct stat info;
  return fstat(fd, &info) == 0 && int64_t(info.st_size) <= offset;
}

int64_t process_id() { return getpid(); }

#endif

void name_thread([[maybe_unused]] const char* name) {
#if defined(__linux__)
  pthread_setname_np(pthread_self(), name);
#endif
}

}  // namespace dymoe
