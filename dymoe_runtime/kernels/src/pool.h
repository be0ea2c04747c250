// Worker threads that share one loop at a time.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dymoe {

/// Number of threads that `parallel_for` may use, the caller included.
int threads();

/// Sets it; 1 or less means the caller alone. Waits for a loop that runs.
void set_threads(int count);

/// Whether each worker stays on a processor of its own, but for the caller; false where that cannot be had.
bool pin_threads(bool pinned);

using Body = void (*)(void* context, int64_t index);
void parallel_for(int64_t count, Body body, void* context);

/// Calls `body(index)` once for each index below `count`, in any order on any thread, and returns
/// when all are done. Runs on the caller alone while another caller has the workers.
template <class F>
void parallel_for(int64_t count, F&& body) {
  using Function = std::remove_reference_t<F>;
  parallel_for(
      count, [](void* context, int64_t index) { (*static_cast<Function*>(context))(index); }, &body);
}

}  // namespace dymoe
