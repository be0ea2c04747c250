#include "threads/read_threads.h"

#include <errno.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
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

// Bytes that a thread reads, and then checks, before it takes the next piece: while some threads check, others keep the
// disk busy. Pieces of a quarter of this take the disk longer. A multiple of the alignment of direct reads.
constexpr int64_t kPieceBytes = int64_t(1) << 20;

/// The checksum of a part of a span.
struct PartSum {
  int64_t nbytes;
  uint32_t sum;
};

/// A read that waits or runs, in pieces of kPieceBytes.
struct Read {
  uint64_t ticket;
  int fd;
  int64_t offset;
  std::vector<Span> spans;
  std::function<void()> then;
  std::vector<uint32_t> checksums;
  int64_t nbytes = 0, next = 0;  // of the spans; where the first piece begins that no thread has taken
  int64_t done = 0;              // where the first byte lies that could not be read; `nbytes` if there is none
  int running = 0, error = 0;    // pieces that threads read now; errno of the piece that ends first
  Clock::time_point begun;
  std::vector<std::map<int64_t, PartSum>> sums;  // of each span, the checksums of its parts by where they begin
};

using SharedRead = std::shared_ptr<Read>;

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

/// Fills spans from `offset` of a file. Sets `error` to errno or 0, and `done` to the bytes read.
void fill(int fd, int64_t offset, const std::vector<Span>& spans, int& error, int64_t& done) {
  error = 0, done = 0;
  while (true) {
    const std::vector<Span> rest = rest_of(spans, done);
    if (rest.empty()) return;
    const int64_t count = read_at(fd, rest, offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      error = errno;
      return;
    }
    done += count;
    // A file may end anywhere, and a direct read from an unaligned offset past its end would fail.
    if (count == 0 || (!rest_of(spans, done).empty() && ends_before(fd, offset + done))) return;
  }
}

/// A piece of a read: the parts of the spans from byte `first` of the read on, and the index of the first one.
struct Piece {
  int64_t first, nbytes;
  size_t span;
  int64_t skipped;  // bytes of that span before the piece
  std::vector<Span> parts;
};

/// Returns the piece of a read that begins at byte `first`.
Piece piece_of(const Read& read, int64_t first) {
  Piece piece{first, std::min(kPieceBytes, read.nbytes - first), 0, first, {}};
  const std::vector<Span>& spans = read.spans;
  while (piece.span < spans.size() && piece.skipped >= spans[piece.span].nbytes)
    piece.skipped -= spans[piece.span++].nbytes;
  int64_t left = piece.nbytes, skip = piece.skipped;
  for (size_t i = piece.span; left > 0; ++i, skip = 0) {
    const int64_t nbytes = std::min(left, spans[i].nbytes - skip);
    piece.parts.push_back({spans[i].data + skip, nbytes});
    left -= nbytes;
  }
  return piece;
}

/// Returns the checksum of parts that follow each other.
uint32_t joined(const std::map<int64_t, PartSum>& parts) {
  uint32_t sum = 0;
  for (const auto& [first, part] : parts) sum = crc32_after(sum, part.sum, part.nbytes);
  return sum;
}

/// Returns 0 if all spans of a complete read have their checksums, else -1 - the index of the first that has not.
int wrong_span(const Read& read) {
  for (size_t i = 0; i < read.checksums.size(); ++i)
    if (joined(read.sums[i]) != read.checksums[i]) return -1 - int(i);
  return 0;
}

}  // namespace

/// Queues and results, which the caller and the threads share.
struct ReadThreads::State {
  mutable std::mutex mutex;
  std::condition_variable wake, ended;
  std::deque<SharedRead> begun;  // those of which a thread has taken a piece, and none the last one
  std::deque<SharedRead> waiting[kUrgencies];
  std::unordered_set<uint64_t> pending;
  std::vector<uint64_t> started;
  std::vector<Outcome> finished;
  uint64_t next = 0;
  bool closed = false, abandoned = false;
  int alive = 0;
  const int64_t process = process_id();
  std::vector<std::thread> threads;

  /// Returns the queue of the read that comes next: one that has begun, else the most urgent, oldest first. Returns
  /// null if no read has a piece left.
  std::deque<SharedRead>* first() {
    if (!begun.empty()) return &begun;
    for (std::deque<SharedRead>& queue : waiting)
      if (!queue.empty()) return &queue;
    return nullptr;
  }

  /// Takes the next piece of the read that comes next.
  std::pair<SharedRead, Piece> take_piece() {
    std::deque<SharedRead>& queue = *first();
    const SharedRead read = queue.front();
    if (&queue != &begun) {
      queue.pop_front();
      begun.push_back(read);
      started.push_back(read->ticket);
      read->begun = Clock::now();
      read->done = read->nbytes;
    }
    const Piece piece = piece_of(*read, read->next);
    read->next += piece.nbytes, ++read->running;
    if (read->next >= read->nbytes) begun.pop_front();
    if (first()) wake.notify_one();
    return {read, piece};
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      wake.wait(lock, [&] { return closed || first(); });
      if (closed) break;
      const auto [read, piece] = take_piece();
      lock.unlock();
      int error = 0;
      int64_t done = 0;
      std::vector<uint32_t> sums;
      if (read->fd >= 0) fill(read->fd, read->offset + piece.first, piece.parts, error, done);
      const bool is_full = done == piece.nbytes;
      if (is_full && !read->checksums.empty())
        for (const Span& part : piece.parts) sums.push_back(crc32_of(part.data, part.nbytes));
      lock.lock();
      if (abandoned) {  // the program may be ending, so the callback is leaked, neither called nor destroyed
        new SharedRead(read);
        break;
      }
      if (!is_full && piece.first + done < read->done) read->done = piece.first + done, read->error = error;
      for (size_t i = 0; i < sums.size(); ++i)
        read->sums[piece.span + i][i ? 0 : piece.skipped] = {piece.parts[i].nbytes, sums[i]};
      // What follows a byte that could not be read is not read.
      if (read->done < read->nbytes && read->next < read->nbytes) {
        read->next = read->nbytes;
        begun.erase(std::find(begun.begin(), begun.end(), read));
      }
      if (--read->running || read->next < read->nbytes) continue;
      lock.unlock();
      end(*read);
      lock.lock();
    }
    --alive;
    ended.notify_all();
  }

  /// Ends a read whose pieces have all ended.
  void end(Read& read) {
    Outcome outcome{read.ticket, read.error, read.fd < 0 ? 0 : read.done, 0};
    const bool is_full = read.done == read.nbytes;
    if (read.fd >= 0 && is_full) outcome.error = wrong_span(read);
    if (read.then && (read.fd < 0 || is_full)) read.then();
    read.then = nullptr;  // destroyed while no lock is held, because that may take another lock
    outcome.seconds = std::chrono::duration<double>(Clock::now() - read.begun).count();
    std::lock_guard<std::mutex> lock(mutex);
    pending.erase(read.ticket);
    finished.push_back(outcome);
    ended.notify_all();
  }

  /// Moves a read out of its queue. Returns null if it is not there.
  SharedRead take(uint64_t ticket, int urgency) {
    std::deque<SharedRead>& queue = waiting[urgency];
    const auto found =
        std::find_if(queue.begin(), queue.end(), [&](const SharedRead& r) { return r->ticket == ticket; });
    if (found == queue.end()) return nullptr;
    const SharedRead read = *found;
    queue.erase(found);
    return read;
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
  auto read = std::make_shared<Read>();
  read->fd = fd, read->offset = offset, read->then = std::move(then), read->checksums = std::move(checksums);
  if (fd >= 0)
    for (const Span& span : spans) read->nbytes += span.nbytes;
  read->sums.resize(spans.size());
  read->spans = std::move(spans);
  std::unique_lock<std::mutex> lock(state_->mutex);
  const uint64_t ticket = read->ticket = state_->next++;
  state_->pending.insert(ticket);
  state_->waiting[urgency].push_back(std::move(read));
  lock.unlock();
  state_->wake.notify_one();
  return ticket;
}

bool ReadThreads::reprioritize(uint64_t ticket, int now, int urgency) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  SharedRead read = state_->take(ticket, now);
  if (!read) return false;
  state_->waiting[urgency].push_back(std::move(read));
  return true;
}

bool ReadThreads::cancel(uint64_t ticket, int urgency) {
  SharedRead read;  // outlives the lock, because destroying its callback may take another lock
  std::lock_guard<std::mutex> lock(state_->mutex);
  read = state_->take(ticket, urgency);
  if (!read) return false;
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
  std::deque<SharedRead> never[kUrgencies], halfway;  // destroyed on this thread, after the lock is released
  bool ended = false;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    ended = state_->alive == 0, state_->abandoned = true;
    threads.swap(state_->threads);
    for (int i = 0; i < kUrgencies; ++i) never[i].swap(state_->waiting[i]);
    halfway.swap(state_->begun);
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
