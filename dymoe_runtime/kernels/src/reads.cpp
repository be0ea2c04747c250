#include "reads.h"

#include <errno.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <unordered_set>
#include <utility>

#if defined(__linux__)
#include <pthread.h>
#endif

namespace dymoe {
namespace {

using Clock = std::chrono::steady_clock;

struct Read {
  uint64_t ticket;
  int fd;
  int64_t offset;
  std::vector<Span> spans;
  std::function<void()> then;
};

/// One call of the system: into as many spans as it takes where it takes several.
ssize_t read_some(int fd, const std::vector<iovec>& rest, int64_t offset) {
#if defined(__linux__)
  return preadv(fd, rest.data(), int(rest.size()), off_t(offset));
#else
  return pread(fd, rest[0].iov_base, rest[0].iov_len, off_t(offset));
#endif
}

constexpr int64_t kMostAtOnce = int64_t(1) << 30;  // Linux reads little more than 2 GB in a call

/// What is left of the spans after their first `done` bytes, as far as one call reads.
std::vector<iovec> rest_of(const std::vector<Span>& spans, int64_t done) {
  std::vector<iovec> rest;
  for (const Span& span : spans) {
    const int64_t skipped = std::min(done, span.nbytes), left = span.nbytes - skipped;
    if (left > 0) rest.push_back({span.data + skipped, size_t(std::min(left, kMostAtOnce))});
    if (left > kMostAtOnce) break;
    done -= skipped;
  }
  return rest;
}

bool ends_before(int fd, int64_t offset) {
  struct stat info;
  return fstat(fd, &info) == 0 && int64_t(info.st_size) <= offset;
}

/// Fills the read's spans, and says with which error and after how many bytes it ended.
void fill(const Read& read, int& error, int64_t& done) {
  error = 0, done = 0;
  while (true) {
    const std::vector<iovec> rest = rest_of(read.spans, done);
    if (rest.empty()) return;
    const ssize_t count = read_some(read.fd, rest, read.offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      error = errno;
      return;
    }
    done += count;
    // A file may end anywhere, and past its end an unaligned direct read is an error of its own.
    if (count == 0 || (!rest_of(read.spans, done).empty() && ends_before(read.fd, read.offset + done))) return;
  }
}

}  // namespace

struct Reads::State {
  mutable std::mutex mutex;
  std::condition_variable wake, ended;
  std::deque<Read> waiting[kUrgencies];
  std::unordered_set<uint64_t> pending;
  std::vector<uint64_t> started;
  std::vector<Outcome> finished;
  uint64_t next = 0;
  bool closed = false, abandoned = false;
  int alive = 0;
  const pid_t process = getpid();
  std::vector<std::thread> threads;

  /// The queue of the most urgent read, the oldest first.
  std::deque<Read>* first() {
    for (std::deque<Read>& queue : waiting)
      if (!queue.empty()) return &queue;
    return nullptr;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      wake.wait(lock, [&] { return closed || first(); });
      if (closed) break;
      std::deque<Read>& queue = *first();
      Read read = std::move(queue.front());
      queue.pop_front();
      started.push_back(read.ticket);
      lock.unlock();
      Outcome outcome{read.ticket, 0, 0, 0};
      const auto begun = Clock::now();
      if (read.fd >= 0) fill(read, outcome.error, outcome.done);
      lock.lock();
      if (abandoned) {  // the program may be about to end, and what would be called with it
        new std::function<void()>(std::move(read.then));
        break;
      }
      lock.unlock();
      if (read.then && (read.fd < 0 || rest_of(read.spans, outcome.done).empty())) read.then();
      read.then = nullptr;  // what it holds may want a lock of its own to go
      outcome.seconds = std::chrono::duration<double>(Clock::now() - begun).count();
      lock.lock();
      pending.erase(read.ticket);
      finished.push_back(outcome);
      ended.notify_all();
    }
    --alive;
    ended.notify_all();
  }

  /// Takes a read out of the queue; false where it is not there.
  bool take(uint64_t ticket, int urgency, Read& read) {
    std::deque<Read>& queue = waiting[urgency];
    const auto found = std::find_if(queue.begin(), queue.end(), [&](const Read& r) { return r.ticket == ticket; });
    if (found == queue.end()) return false;
    read = std::move(*found);
    queue.erase(found);
    return true;
  }
};

Reads::Reads(int threads) : state_(std::make_shared<State>()) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  for (int i = 0; i < threads; ++i) {
    try {
      state_->threads.emplace_back([state = state_] {
#if defined(__linux__)
        pthread_setname_np(pthread_self(), "dymoe-reader");
#endif
        state->serve();
      });
    } catch (const std::system_error&) {  // the system allows no more; fewer do, if more slowly
      if (!i) throw;
      return;
    }
    ++state_->alive;
  }
}

Reads::~Reads() {
  stop(0);
  abandon();
}

uint64_t Reads::submit(int fd, int64_t offset, std::vector<Span> spans, int urgency, std::function<void()> then) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  const uint64_t ticket = state_->next++;
  state_->pending.insert(ticket);
  state_->waiting[urgency].push_back({ticket, fd, offset, std::move(spans), std::move(then)});
  lock.unlock();
  state_->wake.notify_one();
  return ticket;
}

bool Reads::hurry(uint64_t ticket, int now, int urgency) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  Read read;
  if (!state_->take(ticket, now, read)) return false;
  state_->waiting[urgency].push_back(std::move(read));
  return true;
}

bool Reads::cancel(uint64_t ticket, int urgency) {
  Read read;  // goes when the lock has gone
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (!state_->take(ticket, urgency, read)) return false;
  state_->pending.erase(ticket);
  return true;
}

std::vector<uint64_t> Reads::started() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return std::exchange(state_->started, {});
}

std::vector<Outcome> Reads::finished() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return std::exchange(state_->finished, {});
}

int64_t Reads::pending() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return int64_t(state_->pending.size());
}

bool Reads::wait(uint64_t ticket, double seconds) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  return state_->ended.wait_for(lock, std::chrono::duration<double>(seconds),
                                [&] { return !state_->pending.count(ticket); });
}

std::vector<uint64_t> Reads::wait_any(const std::vector<uint64_t>& tickets, double seconds) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  std::vector<uint64_t> ended;
  state_->ended.wait_for(lock, std::chrono::duration<double>(seconds), [&] {
    for (uint64_t ticket : tickets)
      if (!state_->pending.count(ticket)) ended.push_back(ticket);
    return !ended.empty();
  });
  return ended;
}

bool Reads::stop(double seconds) {
  if (getpid() != state_->process) return true;  // forked: the threads are not here, and may have held the lock
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->closed = true;
  state_->wake.notify_all();
  return state_->ended.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return state_->alive == 0; });
}

void Reads::abandon() {
  if (getpid() != state_->process) return;
  std::vector<std::thread> threads;
  std::deque<Read> never[kUrgencies];  // go on this thread, when the lock has gone
  bool ended = false;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    ended = state_->alive == 0, state_->abandoned = true;
    threads.swap(state_->threads);
    for (int i = 0; i < kUrgencies; ++i) never[i].swap(state_->waiting[i]);
  }
  for (std::thread& thread : threads) {
    if (ended)
      thread.join();
    else
      thread.detach();
  }
}

}  // namespace dymoe
