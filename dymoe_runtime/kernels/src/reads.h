// Threads that fill memory from files. read_threads.py is the same in Python, and the reference.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace dymoe {

struct Span {
  uint8_t* data;
  int64_t nbytes;
};

/// How a read ended: after `done` bytes, which are all unless `error` (of errno) or the end of the file kept the rest.
struct Outcome {
  uint64_t ticket;
  int error;
  int64_t done;
  double seconds;
};

constexpr int kUrgencies = 3;  // 0 goes first

class Reads {
 public:
  explicit Reads(int threads);
  ~Reads();

  /// Fills the spans, one after another, from `offset` of the file; where `fd` is below 0 there is none, and nothing
  /// is filled. Once they are full calls `then`, if there is one, on the thread that read. Returns the read's ticket.
  uint64_t submit(int fd, int64_t offset, std::vector<Span> spans, int urgency, std::function<void()> then);

  /// Makes a read that urgent, the last of these; false where it does not wait with `now`, the urgency it had.
  bool hurry(uint64_t ticket, int now, int urgency);

  /// Takes back a read; false where a thread has begun it.
  bool cancel(uint64_t ticket, int urgency);

  /// Reads that a thread has begun, and those that have ended, since the last call.
  std::vector<uint64_t> started();
  std::vector<Outcome> finished();

  /// Reads that have not ended.
  int64_t pending() const;

  /// Waits until the read has ended; false where it takes longer.
  bool wait(uint64_t ticket, double seconds);

  /// Waits until one of the reads has ended, and says which have; none where that takes longer.
  std::vector<uint64_t> wait_any(const std::vector<uint64_t>& tickets, double seconds);

  /// Has the threads end, and waits for that; false where one still reads after so long.
  bool stop(double seconds);

  /// After `stop`: leaves behind the threads that still read. These call nothing any more.
  void abandon();

 private:
  struct State;
  std::shared_ptr<State> state_;  // a thread that was left behind still has it
};

}  // namespace dymoe
