// Checks the threads that read, with real files and with a system that fails.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <numeric>
#include <set>

#include "check.h"
#include "reading.h"
#include "record/checksum.h"
#include "threads/read_threads.h"

namespace dymoe {
namespace {

const char* const kReads = "reads";

/// Buffers of exactly these sizes, and what a read is to do with them.
struct Places {
  std::vector<std::unique_ptr<uint8_t[]>> buffers;
  std::vector<Span> spans;
  int64_t total = 0;

  explicit Places(const std::vector<int64_t>& sizes) {
    for (int64_t size : sizes) {
      buffers.push_back(buffer<uint8_t>(size));
      std::memset(buffers.back().get(), 0xee, size);
      spans.push_back({buffers.back().get(), size});
      total += size;
    }
  }

  /// Whether the first `done` bytes are those of the file from `offset` on, and the others untouched.
  bool hold(const std::vector<uint8_t>& content, int64_t offset, int64_t done) const {
    int64_t at = 0;
    for (const Span& span : spans)
      for (int64_t i = 0; i < span.nbytes; ++i, ++at)
        if (span.data[i] != (at < done ? content[offset + at] : 0xee)) return false;
    return true;
  }
};

/// Waits for a read, of which nobody has been told yet.
Outcome outcome_of(ReadThreads& reads, uint64_t ticket) {
  wait_for(reads, ticket, never);
  for (const Outcome& outcome : reads.finished())
    if (outcome.ticket == ticket) return outcome;
  expect(false, kReads, "a read that has ended is told");
  return {ticket, -1, -1, 0};
}

bool ended(const Outcome& outcome, int error, int64_t done) {
  return outcome.error == error && outcome.done == done && outcome.seconds >= 0;
}

const std::vector<int64_t> kSizes = {4096, 0, 8193, 100};
constexpr int64_t kTotal = 4096 + 8193 + 100;
constexpr int64_t kFileBytes = 50'000;

/// One read from `offset`, which should end after `done` bytes.
void check_read(ReadThreads& reads, int fd, const std::vector<uint8_t>& content, int64_t offset, int error,
                int64_t done, const std::string& what) {
  const Places places(kSizes);
  bool complete_then = false;
  int calls = 0;
  const uint64_t ticket = reads.submit(fd, offset, places.spans, 1, [&] {
    ++calls;
    complete_then = places.hold(content, offset, kTotal);
  });
  const Outcome outcome = outcome_of(reads, ticket);
  expect(ended(outcome, error, done) && places.hold(content, offset, done), kReads, what);
  expect(calls == (done == kTotal) && complete_then == (done == kTotal), kReads, what + ": what comes then");
  expect(reads.started() == std::vector<uint64_t>{ticket} && reads.pending() == 0, kReads, what + ": started");
}

void check_files() {
  const std::vector<uint8_t> content = random_bytes(kFileBytes);
  const TemporaryFile file(content);
  ReadThreads reads(2);
  for (int64_t offset : {int64_t(0), int64_t(1), int64_t(777), kFileBytes - kTotal})
    check_read(reads, file.fd, content, offset, 0, kTotal, "a read that ends well, from " + std::to_string(offset));
  for (int64_t missing : {int64_t(1), int64_t(100), int64_t(101), kTotal - 1, kTotal})
    check_read(reads, file.fd, content, kFileBytes + missing - kTotal, 0, kTotal - missing,
               "a file that lacks " + std::to_string(missing) + " bytes");
  check_read(reads, file.fd, content, kFileBytes + 5, 0, 0, "a read behind the end of the file");
  const int closed = open(kNull, O_WRONLY);
  check_read(reads, closed, content, 0, EBADF, 0, "a file that cannot be read");
  ::close(closed);

  int calls = 0;
  const Outcome no_file = outcome_of(reads, reads.submit(-1, 0, {}, 0, [&] { ++calls; }));
  const Outcome no_bytes = outcome_of(reads, reads.submit(file.fd, 0, {}, 0, [&] { ++calls; }));
  const Outcome no_call = outcome_of(reads, reads.submit(file.fd, 0, {}, 0, nullptr));
  expect(ended(no_file, 0, 0) && ended(no_bytes, 0, 0) && ended(no_call, 0, 0) && calls == 2, kReads,
         "nothing to read");
  expect(close(reads, kPatience, never), kReads, "threads without work end");
}

/// Every way to compute a checksum, over all small sizes, where loops begin and end, and alignments.
void check_checksums() {
  const std::vector<uint8_t> content = random_bytes(kFileBytes), digits = {'1', '2', '3', '4', '5', '6', '7', '8', '9'};
  const Checksum& plain = *available_checksums().back();
  std::vector<int64_t> sizes(1200);
  std::iota(sizes.begin(), sizes.end(), 0);
  sizes.insert(sizes.end(), {4095, 4096, 8193, kFileBytes - 64});
  for (const Checksum* way : available_checksums()) {
    const std::string what = "a checksum by " + std::string(way->name) + ", of bytes: ";
    expect(crc32_of(*way, digits.data(), 9) == 0xcbf43926u, kReads, what + "nine digits");
    for (int64_t nbytes : sizes)
      for (int64_t from : {0, 1, 6, 24}) {
        const auto bytes = buffer<uint8_t>(from + nbytes);
        std::copy_n(content.data(), from + nbytes, bytes.get());
        const uint8_t* const data = bytes.get() + from;
        expect(crc32_of(*way, data, nbytes) == crc32_of(plain, data, nbytes), kReads, what + std::to_string(nbytes));
      }
  }
}

/// Reads of several pieces, whose spans begin and end anywhere in them, by many threads at once.
void check_large_reads() {
  constexpr int64_t kMegabyte = int64_t(1) << 20;
  const std::vector<int64_t> sizes = {kMegabyte + 5, 0, 3 * kMegabyte, 100, 2 * kMegabyte - 105};
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t(0));
  const std::vector<uint8_t> content = random_bytes(total + 7);
  const TemporaryFile file(content);
  std::vector<uint32_t> right;
  int64_t at = 7;
  for (int64_t size : sizes) right.push_back(crc32_of(content.data() + at, size)), at += size;
  ReadThreads reads(5);
  for (int wrong = -1; wrong < int(sizes.size()); ++wrong) {
    std::vector<uint32_t> checksums = right;
    if (wrong >= 0) checksums[wrong] ^= 1;
    std::vector<std::unique_ptr<Places>> places;
    std::vector<uint64_t> tickets;
    std::atomic<int> calls{0};
    for (int i = 0; i < 4; ++i) {
      places.push_back(std::make_unique<Places>(sizes));
      tickets.push_back(reads.submit(file.fd, 7, places.back()->spans, i % kUrgencies, [&] { ++calls; }, checksums));
    }
    for (uint64_t ticket : tickets) wait_for(reads, ticket, never);
    std::set<uint64_t> told;
    for (const Outcome& outcome : reads.finished()) {
      expect(ended(outcome, wrong < 0 ? 0 : -1 - wrong, total), kReads, "a large read with a checksum");
      told.insert(outcome.ticket);
    }
    expect(told == std::set<uint64_t>(tickets.begin(), tickets.end()) && calls == 4, kReads, "large reads are told");
    expect(reads.started().size() == 4 && reads.pending() == 0, kReads, "large reads begin once");
    for (const auto& each : places) expect(each->hold(content, 7, total), kReads, "the bytes of a large read");
  }
  // The file ends in each of the pieces, and where they meet.
  for (int64_t missing : {int64_t(1), kMegabyte - 1, kMegabyte, kMegabyte + 1, 5 * kMegabyte / 2, 6 * kMegabyte}) {
    const Places places(sizes);
    int calls = 0;
    const Outcome outcome =
        outcome_of(reads, reads.submit(file.fd, 7 + missing, places.spans, 0, [&] { ++calls; }, right));
    expect(ended(outcome, 0, total - missing) && calls == 0, kReads, "a large read of a file that ends");
    expect(places.hold(content, 7 + missing, total - missing), kReads, "the bytes before the end of a file");
  }
  expect(close(reads, kPatience, never), kReads, "threads that read in pieces end");
}

/// Reads whose bytes do not have their checksums.
void check_damaged_reads() {
  const std::vector<uint8_t> content = random_bytes(kFileBytes);
  const TemporaryFile file(content);
  ReadThreads reads(2);
  std::vector<uint32_t> right;
  int64_t at = 5;
  for (int64_t size : kSizes) right.push_back(crc32_of(content.data() + at, size)), at += size;
  for (int wrong = -1; wrong < int(kSizes.size()); ++wrong) {
    std::vector<uint32_t> checksums = right;
    if (wrong >= 0) checksums[wrong] ^= 1u << 31;
    const Places places(kSizes);
    const Outcome outcome = outcome_of(reads, reads.submit(file.fd, 5, places.spans, 0, nullptr, checksums));
    expect(ended(outcome, wrong < 0 ? 0 : -1 - wrong, kTotal), kReads, "the checksum that is wrong is told");
  }
  expect(close(reads, kPatience, never), kReads, "threads that compare checksums end");
}

#if defined(__linux__)
/// A system that reads little at a time, is interrupted, and breaks down.
void check_failing_system() {
  const std::vector<uint8_t> content = random_bytes(kFileBytes);
  const TemporaryFile file(content);
  ReadThreads reads(1);
  for (int64_t bytes : {1000, 4096, 8000}) {
    system_reads.bytes_per_call = bytes, system_reads.interruptions = 3;
    check_read(reads, file.fd, content, 7, 0, kTotal,
               "a system that reads so much at a time: " + std::to_string(bytes));
    expect(system_reads.interruptions == 0, kReads, "interruptions");
    system_reads.broken_from = 7 + 5000;
    check_read(reads, file.fd, content, 7, EIO, 5000, "a disk that breaks, after " + std::to_string(bytes));
    system_reads.broken_from = INT64_MAX;
    check_read(reads, file.fd, content, kFileBytes - 5000, 0, 5000, "a short file, after " + std::to_string(bytes));
  }
  system_reads.bytes_per_call = 0;
}
#endif

/// More reads than threads, some of them failing.
void check_many() {
  const std::vector<uint8_t> content = random_bytes(kFileBytes);
  const TemporaryFile file(content);
  ReadThreads reads(3);
  std::vector<std::unique_ptr<Places>> places;
  std::map<uint64_t, int64_t> offsets;
  std::atomic<int> calls{0};
  for (int64_t i = 0; i < 200; ++i) {
    places.push_back(std::make_unique<Places>(kSizes));
    const int64_t offset = i * 251;  // the last ones go beyond the end
    offsets[reads.submit(file.fd, offset, places.back()->spans, int(i % kUrgencies), [&] { ++calls; })] = offset;
  }
  int whole = 0;
  std::set<uint64_t> seen;
  while (seen.size() < offsets.size()) {
    std::vector<uint64_t> left;
    for (const auto& [ticket, offset] : offsets)
      if (!seen.count(ticket)) left.push_back(ticket);
    for (uint64_t ticket : wait_for_any(reads, left, never)) seen.insert(ticket);
  }
  const std::vector<Outcome> outcomes = reads.finished();
  for (const Outcome& outcome : outcomes) {
    const int64_t offset = offsets.at(outcome.ticket),
                  done = std::min(kTotal, std::max<int64_t>(0, kFileBytes - offset));
    expect(ended(outcome, 0, done) && places[offset / 251]->hold(content, offset, done), kReads, "one of many");
    whole += done == kTotal;
  }
  expect(outcomes.size() == 200 && reads.started().size() == 200 && calls == whole && whole < 200, kReads, "many");
  expect(reads.pending() == 0 && reads.finished().empty() && reads.started().empty(), kReads, "each is told once");
}

void check_order() {
  ReadThreads reads(1);
  std::vector<uint64_t> tickets;
  bool has_run[6] = {};
  {
    const Held held(reads);
    expect(reads.started() == std::vector<uint64_t>{held.ticket}, kReads, "what is begun");
    for (int i = 0; i < 6; ++i)  // urgencies 2, 2, 1, 1, 0, 0
      tickets.push_back(reads.submit(-1, 0, {}, 2 - i / 2, [&has_run, i] { has_run[i] = true; }));
    expect(reads.pending() == 7 && !reads.wait(held.ticket, 0.0) && reads.wait_any(tickets, 0.0).empty(), kReads,
           "what waits has not ended");
    expect(reads.reprioritize(tickets[0], 2, 0), kReads, "a read becomes urgent");
    expect(!reads.reprioritize(tickets[0], 2, 1), kReads, "a read that no longer waits there");
    expect(reads.reprioritize(tickets[4], 0, 2), kReads, "a read has time");
    expect(!reads.reprioritize(held.ticket, 0, 1), kReads, "a read that is begun stays where it is");
    expect(reads.cancel(tickets[2], 1), kReads, "a read is taken back");
    expect(!reads.cancel(tickets[2], 1) && !reads.cancel(tickets[3], 0) && !reads.cancel(held.ticket, 0), kReads,
           "a read that cannot be taken back");
    expect(reads.pending() == 6 && reads.wait(tickets[2], 0.0), kReads, "what is taken back is not waited for");
    expect(reads.wait_any({tickets[1], tickets[2]}, 0.0) == std::vector<uint64_t>{tickets[2]}, kReads, "one of two");
  }
  const std::vector<uint64_t> order = {tickets[5], tickets[0], tickets[3], tickets[1], tickets[4]};
  wait_for(reads, order.back(), never);
  expect(reads.started() == order, kReads, "the most urgent go first, and of these the oldest");
  expect(!has_run[2] && std::count(has_run, has_run + 6, true) == 5, kReads, "all but what was taken back");
  for (uint64_t ticket : order) expect(!reads.cancel(ticket, 0), kReads, "a read that has ended");
  expect(reads.wait_any(order, 0.0) == order, kReads, "all that have ended");
}

/// A wait asks from time to time whether it should go on.
void check_interrupted_waits() {
  ReadThreads reads(1);
  const Held held(reads);
  int asked = 0;
  const auto soon = [&] { return ++asked == 2; };
  const auto is_interrupted = [&](const std::function<void()>& call) {
    asked = 0;
    try {
      call();
    } catch (const Interrupted&) {
      return asked == 2;
    }
    return false;
  };
  expect(is_interrupted([&] { wait_for(reads, held.ticket, soon); }), kReads, "an interrupted wait");
  expect(is_interrupted([&] { wait_for_any(reads, {held.ticket}, soon); }), kReads, "an interrupted wait for any");
  held.door->open();
  wait_for(reads, held.ticket, soon);
}

/// Threads that have work when they are to end.
void check_close() {
  const auto token = std::make_shared<int>(0);  // which everything that may still be called holds
  {
    ReadThreads reads(2);
    const Held first(reads), second(reads);
    for (int urgency = 0; urgency < kUrgencies; ++urgency) reads.submit(-1, 0, {}, urgency, [token] { ++*token; });
    expect(token.use_count() == 4, kReads, "what is called holds what it needs");
    int asked = 0;
    const bool all_ended = close(reads, kPatience, [&] {
      if (++asked == 2) first.door->open(), second.door->open();
      return false;
    });
    expect(all_ended, kReads, "threads that end while one waits for them");
    expect(*token == 0 && token.use_count() == 1, kReads, "what waits is never begun, and goes");
    expect(reads.pending() == kUrgencies, kReads, "nor does it end");
  }
  {
    ReadThreads reads(2);
    const Held held(reads);
    expect(!close(reads, 0.0, never), kReads, "a thread that is left behind");
    held.door->open();
    wait_for(reads, held.ticket, never);
  }
  {
    ReadThreads reads(1);
    const Held held(reads);
    bool interrupted = false;
    try {
      close(reads, kPatience, [] { return true; });
    } catch (const Interrupted&) {
      interrupted = true;
    }
    expect(interrupted, kReads, "an end that is interrupted");
    held.door->open();
    wait_for(reads, held.ticket, never);
  }
  {
    auto reads = std::make_unique<ReadThreads>(1);
    const Held held(*reads);
    reads->submit(-1, 0, {}, 0, [token] { ++*token; });
    reads.reset();
    expect(*token == 0 && token.use_count() == 1, kReads, "what waits goes with its threads");
  }
}

#if defined(__linux__)
/// A disk that does not answer: what it fills at last is called for by nobody.
void check_close_while_reading() {
  const std::vector<uint8_t> content = random_bytes(kFileBytes);
  const TemporaryFile file(content);
  const Places places(kSizes);
  Door door;
  std::atomic<int> calls{0};
  {
    ReadThreads reads(1);
    system_reads.door = &door;
    reads.submit(file.fd, 3, places.spans, 0, [&] { ++calls; });
    const uint64_t waits = reads.submit(file.fd, 3, places.spans, 0, [&] { ++calls; });
    expect(door.await_visitor(), kReads, "a read that begins");
    expect(reads.started().size() == 1 && !reads.wait(waits, 0.0), kReads, "a read that waits for another");
    expect(!close(reads, 0.0, never), kReads, "a thread that reads is left behind");
  }
  door.open();
  while (system_reads.threads_gone < 1) usleep(1000);
  expect(calls == 0 && places.hold(content, 3, kTotal), kReads, "a thread that was left behind calls nothing");
}
#endif

void check_reads() {
  check_checksums();
  check_large_reads();
  check_damaged_reads();
  check_files();
  check_many();
  check_order();
  check_interrupted_waits();
  check_close();
#if defined(__linux__)
  check_failing_system();
  check_close_while_reading();
#endif
}

}  // namespace
}  // namespace dymoe
