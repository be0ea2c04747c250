// The experts of a layer for one token, while some of the experts are still being read.
#pragma once

#include <functional>
#include <vector>

#include "ops/moe.h"
#include "threads/read_threads.h"

namespace dymoe {

/// An expert of a call whose read is in flight.
struct PendingExpert {
  int64_t rank;     // index of the expert in the call
  uint64_t ticket;  // of its read
};

/// Runs x [hidden] through the resident experts, then through each pending expert as soon as its read has ended. Writes
/// the sum of the outputs, times weights [experts], to out [hidden]. Returns the seconds spent waiting. `reads` may be
/// null if nothing is pending. Throws std::invalid_argument for arguments that do not fit, and Interrupted once
/// interrupted() is true.
double run_token(const Kernels& isa, const std::vector<const Expert*>& experts, const float* x, const float* weights,
                 Activation activation, ReadThreads* reads, const std::vector<PendingExpert>& pending,
                 const std::function<bool()>& interrupted, float* out);

}  // namespace dymoe
