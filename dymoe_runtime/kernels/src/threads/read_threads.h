// Threads that read files into memory. The reference in Python is store/read_threads.py.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace dymoe {

/// A range of memory that a read fills.
struct Span {
  uint8_t* data;
  int64_t nbytes;
};

/// How a read ended: with all of its bytes, unless an error or the end of the file came first.
struct Outcome {
  uint64_t ticket;
  int error;       // errno, 0, or -1 - i if the bytes of span i do not have their checksum
  int64_t done;    // bytes read
  double seconds;  // of the read and its callback
};

constexpr int kUrgencies = 3;            // degrees of urgency; 0 goes first
constexpr double kCheckInterval = 0.05;  // seconds between checks for an interrupt: a disk may never answer

/// Thrown by a wait that was interrupted.
struct Interrupted {};

/// Threads that read files into memory: the most urgent read first, and the oldest first among equally urgent ones. A
/// read is known by its ticket. Only reads that no thread has begun can be reprioritized or cancelled. Large reads are
/// made in pieces, by several threads; a read that has begun goes before all others.
class ReadThreads {
 public:
  /// Starts `threads` threads, or as many as the system allows. Throws std::system_error if it allows none.
  explicit ReadThreads(int threads);

  /// Leaves behind the threads that still read.
  ~ReadThreads();

  /// Queues a read that fills the spans, one after another, from `offset` of the file. If there are `checksums`, one
  /// CRC-32 for each span, the threads that read compare them. Once all spans are full, it calls `then`, unless that is
  /// empty. With a negative `fd`, it calls `then` without reading. Returns the ticket.
  uint64_t submit(int fd, int64_t offset, std::vector<Span> spans, int urgency, std::function<void()> then,
                  std::vector<uint32_t> checksums = {});

  /// Moves a read that waits with urgency `now` to the end of the reads of another urgency. Returns false if no such
  /// read waits.
  bool reprioritize(uint64_t ticket, int now, int urgency);

  /// Removes a read that waits with this urgency. Returns false if no such read waits.
  bool cancel(uint64_t ticket, int urgency);

  /// Returns the tickets of the reads that threads have begun since the last call.
  std::vector<uint64_t> started();

  /// Returns the outcomes of the reads that have ended since the last call.
  std::vector<Outcome> finished();

  /// Returns the number of reads that have not ended.
  int64_t pending() const;

  /// Waits until the read has ended. Returns false if that takes longer than `seconds`.
  bool wait(uint64_t ticket, double seconds);

  /// Waits until one of the reads has ended. Returns the tickets of those that have; none if that takes longer than
  /// `seconds`.
  std::vector<uint64_t> wait_any(const std::vector<uint64_t>& tickets, double seconds);

  /// Ends the threads; reads that no thread has begun are dropped. Returns false if a thread still reads after
  /// `seconds`.
  bool stop(double seconds);

  /// Leaves behind the threads that still read after `stop`. They make no callback any more.
  void abandon();

 private:
  struct State;
  std::shared_ptr<State> state_;  // shared with the threads, because one that is left behind still uses it
};

/// Waits until the read has ended. Throws Interrupted once interrupted() is true.
void wait_for(ReadThreads& reads, uint64_t ticket, const std::function<bool()>& interrupted);

/// Waits until one of the reads has ended, and returns the tickets of those that have. Throws Interrupted once
/// interrupted() is true.
std::vector<uint64_t> wait_for_any(ReadThreads& reads, const std::vector<uint64_t>& tickets,
                                   const std::function<bool()>& interrupted);

/// Ends the threads and waits for them at most about `patience_s` seconds. Returns false if a thread still reads, which
/// is then left behind. Throws Interrupted once interrupted() is true; threads that still read are left behind.
bool close(ReadThreads& reads, double patience_s, const std::function<bool()>& interrupted);

}  // namespace dymoe
