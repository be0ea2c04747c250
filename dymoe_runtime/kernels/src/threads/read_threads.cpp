#include "threads/read_threads.h"

#include <errno.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <unordered_set>
#include <utility>

#include "record/checksum.h"
#include "threads/system.h"

namespace dymoe {
namespace {

using Clock = std::chrono::steady_clock;

/// A read that waits or runs.
struct Read {
  uint64_t ticket;
  int fd;
  int64_t offset;
  std::vector<Span> spans;
  std::function<void()> then;
  std::vector<uint32_t> checksums;
};

constexpr int64_t kMaxPerCall = int64_t(1) << 30;  // bytes; Linux reads little more than 2 GB in one call

/// Returns what is left of the spans after their first `done` bytes, as far as one system call reads.
std::vector<Span> rest_of(const std::vector<Span>& spans, int64_t done) {
  std::vector<Span> rest;
  for (const Span& span : spans) {
    const int64_t skipped = std::min(done, span.nbytes), left = span.nbytes - skipped;
    if (left > 0) rest.push_back({span.data + skipped, std::min(left, kMaxPerCall)});
    if (left > kMaxPerCall) break;
    done -= skipped;
  }
  return rest;
}

/// Fills the spans of a read. Sets `error` to errno or 0, and `done` to the bytes read.
void fill(const Read& read, int& error, int64_t& done) {
  error = 0, done = 0;
  while (true) {
    const std::vector<Span> rest = rest_of(read.spans, done);
    if (rest.empty()) return;
    const int64_t count = read_at(read.fd, rest, read.offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      error = errno;
      return;
    }
    done += count;
    // A file may end anywhere, and a direct read from an unaligned offset past its end would fail.
    if (count == 0 || (!rest_of(read.spans, done).empty() && ends_before(read.fd, read.offset + done))) return;
  }
}

/// Returns 0 if all spans of a read have their checksums, else -1 - the index of the first that has not.
int wrong_span(const Read& read) {
  for (size_t i = 0; i < read.checksums.size(); ++i)
    if (crc32_of(read.spans[i].data, read.spans[i].nbytes) != read.checksums[i]) return -1 - int(i);
  return 0;
}

}  // namespace

/// Queues and results, which the caller and the threads share.
struct ReadThreads::State {
  mutable std::mutex mutex;
  std::condition_variable wake, ended;
  std::deque<Read> waiting[kUrgencies];
  std::unordered_set<uint64_t> pending;
  std::vector<uint64_t> started;
  std::vector<Outcome> finished;
  uint64_t next = 0;
  bool closed = false, abandoned = false;
  int alive = 0;
  const int64_t process = process_id();
  std::vector<std::thread> threads;

  /// Returns the queue of the most urgent read that waits, oldest first; null if none waits.
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
      if (abandoned) {  // the program may be ending, so the callback is leaked, neither called nor destroyed
        new std::function<void()>(std::move(read.then));
        break;
      }
      lock.unlock();
      const bool is_full = rest_of(read.spans, outcome.done).empty();
      if (read.fd >= 0 && is_full) outcome.error = wrong_span(read);
      if (read.then && (read.fd < 0 || is_full)) read.then();
      read.then = nullptr;  // destroyed while no lock is held, because that may take another lock
      outcome.seconds = std::chrono::duration<double>(Clock::now() - begun).count();
      lock.lock();
      pending.erase(read.ticket);
      finished.push_back(outcome);
      ended.notify_all();
    }
    --alive;
    ended.notify_all();
  }

  /// Moves a read out of its queue. Returns false if it is not there.
  bool take(uint64_t ticket, int urgency, Read& read) {
    std::deque<Read>& queue = waiting[urgency];
    const auto found = std::find_if(queue.begin(), queue.end(), [&](const Read& r) { return r.ticket == ticket; });
    if (found == queue.end()) return false;
    read = std::move(*found);
    queue.erase(found);
    return true;
  }
};

ReadThreads::ReadThreads(int threads) : state_(std::make_shared<State>()) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  for (int i = 0; i < threads; ++i) {
    try {
      state_->threads.emplace_back([state = state_] {
        name_thread("dymoe-reader");
        state->serve();
      });
    } catch (const std::system_error&) {  // the system allows no more threads; fewer are only slower
      if (!i) throw;
      return;
    }
    ++state_->alive;
  }
}

ReadThreads::~ReadThreads() {
  stop(0);
  abandon();
}

uint64_t ReadThreads::submit(int fd, int64_t offset, std::vector<Span> spans, int urgency, std::function<void()> then,
                             std::vector<uint32_t> checksums) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  const uint64_t ticket = state_->next++;
  state_->pending.insert(ticket);
  state_->waiting[urgency].push_back({ticket, fd, offset, std::move(spans), std::move(then), std::move(checksums)});
  lock.unlock();
  state_->wake.notify_one();
  return ticket;
}

bool ReadThreads::reprioritize(uint64_t ticket, int now, int urgency) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  Read read;
  if (!state_->take(ticket, now, read)) return false;
  state_->waiting[urgency].push_back(std::move(read));
  return true;
}

bool ReadThreads::cancel(uint64_t ticket, int urgency) {
  Read read;  // outlives the lock, because destroying its callback may take another lock
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (!state_->take(ticket, urgency, read)) return false;
  state_->pending.erase(ticket);
  return true;
}

std::vector<uint64_t> ReadThreads::started() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return std::exchange(state_->started, {});
}

std::vector<Outcome> ReadThreads::finished() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return std::exchange(state_->finished, {});
}

int64_t ReadThreads::pending() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return int64_t(state_->pending.size());
}

bool ReadThreads::wait(uint64_t ticket, double seconds) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  return state_->ended.wait_for(lock, std::chrono::duration<double>(seconds),
                                [&] { return !state_->pending.count(ticket); });
}

std::vector<uint64_t> ReadThreads::wait_any(const std::vector<uint64_t>& tickets, double seconds) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  std::vector<uint64_t> ended;
  state_->ended.wait_for(lock, std::chrono::duration<double>(seconds), [&] {
    for (uint64_t ticket : tickets)
      if (!state_->pending.count(ticket)) ended.push_back(ticket);
    return !ended.empty();
  });
  return ended;
}

bool ReadThreads::stop(double seconds) {
  if (process_id() != state_->process)
    return true;  // a forked child: it has no threads, and one may have held the lock
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->closed = true;
  state_->wake.notify_all();
  return state_->ended.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return state_->alive == 0; });
}

void ReadThreads::abandon() {
  if (process_id() != state_->process) return;
  std::vector<std::thread> threads;
  std::deque<Read> never[kUrgencies];  // destroyed on this thread, after the lock is released
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

void wait_for(ReadThreads& reads, uint64_t ticket, const std::function<bool()>& interrupted) {
  while (!reads.wait(ticket, kCheckInterval))
    if (interrupted()) throw Interrupted{};
}

std::vector<uint64_t> wait_for_any(ReadThreads& reads, const std::vector<uint64_t>& tickets,
                                   const std::function<bool()>& interrupted) {
  while (true) {
    std::vector<uint64_t> ended = reads.wait_any(tickets, kCheckInterval);
    if (!ended.empty()) return ended;
    if (interrupted()) throw Interrupted{};
  }
}

bool close(ReadThreads& reads, double patience_s, const std::function<bool()>& interrupted) {
  bool ended = false, stopped = false;
  do {
    ended = reads.stop(std::min(patience_s, kCheckInterval));
    stopped = interrupted();
    patience_s -= kCheckInterval;
  } while (!ended && !stopped && patience_s > 0);
  reads.abandon();
  if (stopped) throw Interrupted{};
  return ended;
}

}  // namespace dymoe
