// Worker threads that share the work of one loop at a time.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dymoe {

/// Returns the number of threads that `parallel_for` may use, the caller included.
int threads();

/// Sets the number of threads that `parallel_for` may use; 1 or less means the caller alone. Waits for a running loop.
void set_threads(int count);

/// Pins each worker to a processor of its own, or stops doing so. The caller of a loop is never pinned. Returns false
/// if the system cannot pin threads.
bool pin_threads(bool pinned);

/// Calls body(context, i) for i in [0, count), as the template below does.
using Body = void (*)(void* context, int64_t index);
void parallel_for(int64_t count, Body body, void* context);

/// Calls body(i) once for each i in [0, count), in any order and on any thread. Returns when all calls have returned.
/// While another caller has the workers, the calling thread does all the work.
template <class F>
void parallel_for(int64_t count, F&& body) {
  using Function = std::remove_reference_t<F>;
  parallel_for(count, [](void* context, int64_t index) { (*static_cast<Function*>(context))(index); }, &body);
}

}  // namespace dymoe
