#include "decode/token.h"

#include <chrono>
#include <map>
#include <stdexcept>

namespace dymoe {
namespace {

/// Returns the index of the expert of each ticket. Throws std::invalid_argument for an expert that does not exist, and
/// for an expert or a ticket that occurs twice.
std::map<uint64_t, int64_t> ranks_of(const std::vector<PendingExpert>& pending, int64_t experts, bool reading) {
  std::map<uint64_t, int64_t> ranks;
  std::vector<bool> seen(experts);
  for (const auto& [rank, ticket] : pending) {
    if (!reading || rank < 0 || rank >= experts)
      throw std::invalid_argument("pending: expected experts that are being read");
    if (seen[rank] || !ranks.emplace(ticket, rank).second)
      throw std::invalid_argument("pending: an expert or a read twice");
    seen[rank] = true;
  }
  return ranks;
}

}  // namespace

double run_token(const Kernels& isa, const std::vector<const Expert*>& experts, const float* x, const float* weights,
                 Activation activation, ReadThreads* reads, const std::vector<PendingExpert>& pending,
                 const std::function<bool()>& interrupted, float* out) {
  if (experts.empty()) throw std::invalid_argument("experts: expected at least one");
  const MatrixView& gate = experts[0]->gate;
  for (const Expert* expert : experts)
    if (expert->gate.rows != gate.rows || expert->gate.cols != gate.cols)
      throw std::invalid_argument("experts: their shapes differ");
  std::map<uint64_t, int64_t> left = ranks_of(pending, int64_t(experts.size()), reads != nullptr);
  std::vector<bool> waits(experts.size());
  for (const auto& read : left) waits[read.second] = true;
  std::vector<int64_t> ready;
  for (int64_t rank = 0; rank < int64_t(experts.size()); ++rank)
    if (!waits[rank]) ready.push_back(rank);
  TokenMoe token(isa, experts, x, activation);
  double waited = 0;
  while (true) {
    if (!ready.empty()) token.run(ready);
    if (left.empty()) break;
    std::vector<uint64_t> tickets;
    for (const auto& read : left) tickets.push_back(read.first);
    const auto begun = std::chrono::steady_clock::now();
    ready.clear();
    for (uint64_t ticket : wait_for_any(*reads, tickets, interrupted)) {
      ready.push_back(left.at(ticket));
      left.erase(ticket);
    }
    waited += std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  }
  token.combine(weights, out);
  return waited;
}

}  // namespace dymoe
