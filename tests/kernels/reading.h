// What the checks of reads share: a temporary file, work that waits, and a system whose reads a check can spoil or
// hold.
#pragma once

#include <errno.h>
#include <fcntl.h>
#if defined(_WIN32)
#include <io.h>
#include <sys/stat.h>
#else
#include <sys/uio.h>
#include <unistd.h>
#endif

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#include "check.h"
#include "threads/read_threads.h"

#if defined(__linux__)
#include <sys/syscall.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/lsan_interface.h>
#endif

namespace dymoe {
namespace {

constexpr double kPatience = 60.0;  // seconds for what should come at once

bool never() { return false; }

#if defined(_WIN32)
constexpr const char* kNull = "NUL";

/// Opens a new file that is gone when it is closed; returns -1 if that fails.
int open_temporary() {
  const char* path = _tempnam(nullptr, "kernel_check");
  return path ? _open(path, _O_RDWR | _O_CREAT | _O_EXCL | _O_TEMPORARY | _O_BINARY, _S_IREAD | _S_IWRITE) : -1;
}
#else
constexpr const char* kNull = "/dev/null";

int open_temporary() {
  const char* directory = std::getenv("TMPDIR");
  std::string path = std::string(directory ? directory : "/tmp") + "/kernel_check.XXXXXX";
  const int fd = mkstemp(&path[0]);
  return fd < 0 || unlink(path.c_str()) ? -1 : fd;
}
#endif

/// A real file without a name.
struct TemporaryFile {
  int fd = open_temporary();

  explicit TemporaryFile(const std::vector<uint8_t>& content) {
    if (fd < 0 || write(fd, content.data(), content.size()) != int64_t(content.size()))
      throw std::runtime_error("no temporary file");
  }
  ~TemporaryFile() { ::close(fd); }
};

/// A door that threads wait at until it opens. What is behind it outlives the check.
class Door {
 public:
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }

  /// Waits until a thread is at the door; false where none comes.
  bool await_visitor() {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::duration<double>(kPatience), [this] { return waiting_ > 0; });
  }

  void open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0;
  bool open_ = false;
};

/// Work for a reader that goes on when it is let; the reader is at it once this is made.
struct Held {
  std::shared_ptr<Door> door = std::make_shared<Door>();
  uint64_t ticket;

  explicit Held(ReadThreads& reads) {
    ticket = reads.submit(-1, 0, {}, 0, [door = door] { door->wait(); });
    expect(door->await_visitor(), "reads", "work that a thread begins");
  }
  ~Held() { door->open(); }
};

/// How the system reads, as a check has it.
struct System {
  std::atomic<int64_t> bytes_per_call{0};       // at most, 0 for all
  std::atomic<int> interruptions{0};            // calls still to fail with EINTR
  std::atomic<int64_t> broken_from{INT64_MAX};  // offset from which on the disk does not read
  std::atomic<Door*> door{nullptr};             // that a read waits at before it begins
  std::atomic<int> threads_gone{0};             // of those that have waited there
};

System system_reads;

/// Counts the end of its thread.
struct LastWord {
  bool spoken = false;
  ~LastWord() {
    if (spoken) ++system_reads.threads_gone;
  }
};

#if defined(__linux__)
ssize_t really_read(int fd, const iovec* parts, int count, int64_t offset) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return preadv64(fd, parts, count, offset);  // which the sanitizer sees
#else
  return syscall(SYS_preadv, fd, parts, count, long(offset), 0L);
#endif
}

ssize_t read_as_told(int fd, const iovec* parts, int count, int64_t offset) {
  thread_local LastWord last_word;
  if (Door* door = system_reads.door.exchange(nullptr)) {
    last_word.spoken = true;
    door->wait();
#if defined(__SANITIZE_ADDRESS__)
    __lsan_disable();  // a thread that is left behind leaves its work behind, on purpose
#endif
  }
  if (system_reads.interruptions > 0) {
    --system_reads.interruptions;
    errno = EINTR;
    return -1;
  }
  if (offset < 0) return really_read(fd, parts, count, offset);  // which the system refuses
  if (offset >= system_reads.broken_from) {
    errno = EIO;
    return -1;
  }
  const int64_t most = std::min<int64_t>(system_reads.bytes_per_call ? system_reads.bytes_per_call.load() : INT64_MAX,
                                         system_reads.broken_from - offset);
  std::vector<iovec> some;
  int64_t left = most;
  for (int i = 0; i < count && left > 0; ++i) {
    some.push_back({parts[i].iov_base, size_t(std::min<int64_t>(left, int64_t(parts[i].iov_len)))});
    left -= int64_t(some.back().iov_len);
  }
  return really_read(fd, some.data(), int(some.size()), offset);
}
#endif

}  // namespace
}  // namespace dymoe

#if defined(__linux__)
/// Stands before the C library's.
extern "C" ssize_t preadv(int fd, const iovec* parts, int count, off_t offset) {
  return dymoe::read_as_told(fd, parts, count, int64_t(offset));
}
#endif
