#include "threads/pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace dymoe {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);  // longer than the time between two loops of one layer

/// Tells the processor that this thread spins.
void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Pins a worker to one of the processors that its caller may use: worker 0 to the second one, and so on.
void pin([[maybe_unused]] std::thread& thread, [[maybe_unused]] int worker) {
#if defined(__linux__)
  cpu_set_t allowed, one;
  if (pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed)) return;
  int left = (worker + 1) % CPU_COUNT(&allowed), cpu = 0;
  while (!CPU_ISSET(cpu, &allowed) || left--) ++cpu;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  pthread_setaffinity_np(thread.native_handle(), sizeof one, &one);
#endif
}

/// Waits for `ready()` for at most about kSpin, and returns whether it became true.
template <class Ready>
bool spin(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

/// Runs loops on the caller and its workers. The gate is one word: the number of the loop, whether workers may still
/// join the loop, and how many are in it. A worker that wakes too late finds the gate closed, so nobody waits for it.
class Pool {
 public:
  int size() const { return size_.load(); }

  bool pinned() const { return pinned_.load(); }

  void resize(int size, bool pinned) {
    std::lock_guard<std::mutex> lock(owner_);
    stop();
    size_ = size < 1 ? 1 : size, pinned_ = pinned;
  }

  void run(int64_t count, Body body, void* context) {
    std::unique_lock<std::mutex> lock(owner_, std::defer_lock);
    if (count < 2 || size_ < 2 || !lock.try_lock()) {
      for (int64_t i = 0; i < count; ++i) body(context, i);
      return;
    }
    start();
    body_ = body, context_ = context, count_ = count, next_ = 0;
    open();
    work();
    close();
  }

 private:
  static constexpr uint64_t kLoop = uint64_t(1) << 17, kOpen = uint64_t(1) << 16, kMembers = kOpen - 1;

  std::mutex owner_;  // held by the caller of the running loop
  std::atomic<int> size_{1};
  std::atomic<bool> pinned_{false};
  std::vector<std::thread> workers_;

  Body body_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};

  std::atomic<uint64_t> gate_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleepers_{0};
  std::mutex sleep_;
  std::condition_variable wake_;

  void start() {
    while (int(workers_.size()) < size_ - 1) {
      try {
        workers_.emplace_back([this, seen = gate_.load() / kLoop] { serve(seen); });
        if (pinned_) pin(workers_.back(), int(workers_.size()) - 1);
      } catch (const std::system_error&) {  // the system allows no more threads
        size_ = int(workers_.size()) + 1;
      }
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stopping_ = false;
  }

  void open() {
    gate_ = (gate_.load() / kLoop + 1) * kLoop + kOpen;
    if (sleepers_ == 0) return;
    {
      std::lock_guard<std::mutex> lock(sleep_);
    }
    wake_.notify_all();
  }

  void close() {
    gate_ &= ~kOpen;
    const auto empty = [this] { return (gate_.load() & kMembers) == 0; };
    while (!spin(empty)) std::this_thread::yield();
  }

  void work() {
    for (int64_t i = next_++; i < count_; i = next_++) body_(context_, i);
  }

  void serve(uint64_t seen) {
    const auto called = [&] {
      const uint64_t gate = gate_.load();
      return stopping_ || ((gate & kOpen) && gate / kLoop != seen);
    };
    while (true) {
      if (!spin(called)) sleep(called);
      if (stopping_) return;
      uint64_t gate = gate_.load();
      if (!(gate & kOpen) || !gate_.compare_exchange_strong(gate, gate + 1)) continue;
      seen = gate / kLoop;
      work();
      --gate_;
    }
  }

  template <class Called>
  void sleep(Called called) {
    std::unique_lock<std::mutex> lock(sleep_);
    ++sleepers_;
    wake_.wait(lock, called);
    --sleepers_;
  }
};

/// Owns the pool and joins its threads at exit. The pool itself is never freed, because a daemon thread may still call.
/// A forked child has none of the threads, so it abandons the pool, which may be locked, for a new one of the same
/// size.
class Owner {
 public:
  Owner() {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { owner().abandon(); });
#endif
  }
  ~Owner() { pool_->resize(1, false); }

  static Owner& owner() {
    static Owner instance;
    return instance;
  }
  Pool& pool() { return *pool_; }

 private:
  Pool* pool_ = new Pool;

  void abandon() {
    const int size = pool_->size();
    const bool pinned = pool_->pinned();
    pool_ = new Pool;
    pool_->resize(size, pinned);
  }
};

}  // namespace

int threads() { return Owner::owner().pool().size(); }

void set_threads(int count) { Owner::owner().pool().resize(count, Owner::owner().pool().pinned()); }

bool pin_threads(bool pinned) {
  Owner::owner().pool().resize(threads(), pinned);
#if defined(__linux__)
  return true;
#else
  return !pinned;
#endif
}

void parallel_for(int64_t count, Body body, void* context) { Owner::owner().pool().run(count, body, context); }

}  // namespace dymoe
