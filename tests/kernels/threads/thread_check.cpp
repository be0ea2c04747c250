// Threads that really run at the same time, for the thread sanitizer: the pool, the threads that read, and tokens of
// several models. What each thread computes is held against what one thread computes alone.
#include <atomic>
#include <functional>
#include <thread>

#include "../check.h"
#include "../check_reads.h"
#include "../check_stack.h"
#include "../check_token.h"
#include "isa/isa.h"
#include "threads/pool.h"

namespace dymoe {
namespace {

constexpr int kCallers = 3;

/// Runs work(0), work(1), ... in a thread each; they begin together. Returns when all have ended.
void at_once(int count, const std::function<void(int)>& work) {
  std::atomic<int> ready{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i)
    threads.emplace_back([&, i] {
      ++ready;
      while (ready < count) std::this_thread::yield();
      work(i);
    });
  for (std::thread& thread : threads) thread.join();
}

/// Loops of several callers, of which one at a time has the workers, while another thread changes their number.
void check_loops() {
  constexpr int64_t kCount = 97, kLoops = 60;
  set_threads(3);
  std::vector<int64_t> wrong(kCallers);
  std::atomic<int> looping{kCallers};
  at_once(kCallers + 1, [&](int caller) {
    if (caller == kCallers) {
      for (int n = 0; looping > 0; ++n) set_threads(1 + n % 4);
      return;
    }
    for (int64_t loop = 0; loop < kLoops; ++loop) {
      std::vector<int64_t> done(kCount);  // not atomic: each index belongs to one thread
      parallel_for(kCount, [&](int64_t i) { done[i] += loop * i; });
      for (int64_t i = 0; i < kCount; ++i) wrong[caller] += done[i] != loop * i;
    }
    --looping;
  });
  set_threads(3);
  std::vector<int64_t> idle(kCount);
  for (int n = 0; n < 3; ++n) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // long enough for the workers to sleep
    parallel_for(kCount, [&](int64_t i) { ++idle[i]; });
  }
  for (int64_t count : idle) wrong[0] += count != 3;
  for (int64_t count : wrong) expect(count == 0, "threads", "loops of several callers");
}

/// A layer's experts for many tokens, by several callers at once.
void check_products() {
  const ExpertMatrices expert(512, 320, {2, 1, 1}, 4);
  const std::vector<float> x = random_floats(40 * 512);
  std::vector<int64_t> tokens(40);
  std::iota(tokens.begin(), tokens.end(), 0);
  const auto run = [&] {
    std::vector<float> y(x.size());
    moe(kScalar, {{expert.view, 0, 40}}, x.data(), tokens.data(), {ActivationKind::silu}, y.data());
    return y;
  };
  set_threads(1);
  const std::vector<float> alone = run();
  set_threads(3);
  std::vector<std::vector<float>> found(kCallers);
  at_once(kCallers, [&](int caller) { found[caller] = run(); });
  for (const std::vector<float>& y : found) expect(y == alone, "threads", "products of several callers");
}

/// Threads that submit, cancel, reprioritize and wait on the same queue, in all orders.
void check_one_queue() {
  const std::vector<uint8_t> content = random_bytes(kFileBytes);
  const TemporaryFile file(content);
  std::vector<uint32_t> checksums;
  int64_t at = 0;
  for (int64_t size : kSizes)
    checksums.push_back(crc32_of(*available_checksums().back(), content.data() + at, size)), at += size;
  ReadThreads reads(3);
  std::atomic<int> calls{0}, cancelled{0};
  std::vector<int64_t> wrong(kCallers);
  system_reads.bytes_per_call = 300;  // so that a read takes some time, where the system can be told
  at_once(kCallers, [&](int caller) {
    for (int n = 0; n < 40; ++n) {
      const Places whole(kSizes), dropped(kSizes);
      const auto read = [&](const Places& places, int urgency) {
        return reads.submit(file.fd, 0, places.spans, urgency, [&] { ++calls; }, checksums);
      };
      const uint64_t first = read(whole, 2), second = read(dropped, 1);
      reads.reprioritize(first, 2, 0);
      if (reads.cancel(second, 1)) {
        ++cancelled;
      } else {
        wait_for(reads, second, never);
      }
      if (n % 2) {
        wait_for_any(reads, {first}, never);
      } else {
        while (!reads.wait(first, 0.0)) std::this_thread::yield();  // sees the end earlier than who is woken
      }
      wrong[caller] += !whole.hold(content, 0, kTotal);
      reads.started();
    }
  });
  system_reads.bytes_per_call = 0;
  int64_t ended = 0;
  for (const Outcome& outcome : reads.finished()) ended += outcome.error == 0 && outcome.done == kTotal;
  for (int64_t count : wrong) expect(count == 0, kReads, "reads of several callers");
  expect(ended == kCallers * 80 - cancelled && calls == ended && reads.pending() == 0, kReads,
         "all that were not taken back");
}

/// Work so short that its ends meet.
void check_short_work() {
  constexpr int kCount = 3000;
  ReadThreads reads(4);
  std::atomic<int> calls{0};
  size_t told = 0, begun = 0;
  for (int i = 0; i < kCount; ++i) reads.submit(-1, 0, {}, i % kUrgencies, [&] { ++calls; });
  while (told < kCount) told += reads.finished().size(), begun += reads.started().size();
  expect(calls == kCount && begun + reads.started().size() == kCount, kReads, "short work is told once");
}

/// Tokens of several models at once, whose experts arrive while the call runs.
void check_arriving() {
  const TokenCase c;
  const TemporaryFile file(c.content);
  set_threads(1);
  const std::vector<float> expected = c.plain(kScalar, c.views());
  set_threads(3);
  std::vector<int> wrong(kCallers);
  at_once(kCallers, [&](int caller) {
    for (int n = 0; n < 10; ++n) {
      ReadThreads reads(2);
      std::vector<const Expert*> all = c.views();
      std::vector<ExpertMatrices> memory;
      memory.reserve(all.size());
      std::vector<PendingExpert> pending;
      for (int64_t rank = 0; rank < c.kCount; ++rank) {
        if (rank == n % c.kCount) continue;
        memory.push_back(c.experts[rank].blank());
        all[rank] = &memory.back().view;
        pending.push_back({rank, reads.submit(file.fd, c.offsets[rank], memory.back().spans(), 0, nullptr)});
      }
      wrong[caller] += c.run(kScalar, all, &reads, pending) != expected;
    }
  });
  for (int count : wrong) expect(count == 0, kReads, "tokens whose experts arrive");
}

/// Whole tokens through the compiled layers of several models at once.
void check_models() {
  std::vector<std::unique_ptr<Model>> models;
  std::vector<std::vector<Floats1D>> inputs, expected;
  set_threads(1);
  for (int m = 0; m < kCallers; ++m) {
    models.push_back(std::make_unique<Model>(
        256, 192, std::vector<LayerShape>{{plain_options(8, 4, 32, 3), 16}, {plain_options(8, 2, 32, 2), 8}}));
    const std::vector<State> states = models[m]->other_states();
    inputs.emplace_back(), expected.emplace_back();
    for (int64_t index = 0; index < kCapacity; ++index) {
      inputs[m].push_back(random_floats(models[m]->hidden));
      const Angles angles(index, *models[m]);
      expected[m].push_back(plain_run(kScalar, *models[m], inputs[m].back(), angles.position, states).back().in);
    }
  }
  set_threads(3);
  std::vector<int> wrong(kCallers);
  at_once(kCallers, [&](int m) {
    const DecodeStack stack = models[m]->stack(kScalar);
    const Buffers token(*models[m]);
    for (int64_t index = 0; index < kCapacity; ++index) {
      const Angles angles(index, *models[m]);
      stack.run(&models[m]->table, 0, inputs[m][index].data(), nullptr, {angles.position}, token.view());
      wrong[m] += !token.has_residual(expected[m][index]);
    }
  });
  set_threads(1);
  for (int count : wrong) expect(count == 0, "threads", "tokens of several models");
}

/// Threads that end in every way, again and again: idle, with work that waits, and in mid read.
void check_ends() {
  const std::vector<uint8_t> content = random_bytes(kFileBytes);
  std::atomic<int> calls{0};
  const auto file = std::make_shared<const TemporaryFile>(content);
  for (int n = 0; n < 60; ++n) {
    ReadThreads reads(2);
    for (int i = 0; i < n % 7; ++i) {
      // What a thread that is left behind still uses lives as long as its read.
      const auto places = std::make_shared<const Places>(kSizes);
      reads.submit(file->fd, i, places->spans, i % kUrgencies, [&calls, file, places] { ++calls; });
    }
    if (n % 3) expect(close(reads, n % 3 == 1 ? kPatience : 0.0, never) || n % 3 == 2, kReads, "threads that end");
  }
  usleep(100'000);  // for those that were left behind in mid read
}

}  // namespace
}  // namespace dymoe

int main() {
  using namespace dymoe;
  check_loops();
  check_products();
  check_one_queue();
  check_short_work();
  check_arriving();
  check_models();
  check_ends();
  std::printf("threads: %s\n", failures ? "WRONG" : "right");
  return failures > 0;
}
