// Checks one token through the experts of a layer, some of which are still being read.
#pragma once

#include <numeric>
#include <utility>

#include "check.h"
#include "decode/token.h"
#include "isa/isa.h"
#include "ops/moe.h"
#include "reading.h"

namespace dymoe {
namespace {

/// Four experts at mixed tiers in a file, and a token for them.
struct TokenCase {
  static constexpr int64_t kHidden = 150, kWidth = 77, kCount = 4;
  std::vector<ExpertMatrices> experts;
  std::vector<int64_t> offsets;  // in the file
  std::vector<uint8_t> content;
  std::vector<float> x = random_floats(kHidden), weights = {0.4f, 0.3f, 0.2f, 0.1f};

  TokenCase() {
    const std::vector<int> widths[] = {{2, 1, 1}, {2}, {2, 1}, {4}};
    for (const std::vector<int>& split : widths) {
      experts.emplace_back(kHidden, kWidth, split, 4);
      const std::vector<uint8_t> bytes = experts.back().bytes();
      offsets.push_back(int64_t(content.size()));
      content.insert(content.end(), bytes.begin(), bytes.end());
    }
  }

  std::vector<const Expert*> views() const {
    std::vector<const Expert*> all;
    for (const ExpertMatrices& expert : experts) all.push_back(&expert.view);
    return all;
  }

  /// What a call of all experts and their sum make of the token.
  std::vector<float> plain(const Kernels& isa, const std::vector<const Expert*>& all) const {
    std::vector<ExpertRows> parts;
    const std::vector<int64_t> tokens(kCount, 0);
    std::vector<int64_t> rows(kCount);
    std::iota(rows.begin(), rows.end(), 0);
    for (int64_t j = 0; j < kCount; ++j) parts.push_back({*all[j], j, 1});
    std::vector<float> y(kCount * kHidden), out(kHidden);
    moe(isa, parts, x.data(), tokens.data(), Activation{ActivationKind::gelu}, y.data());
    combine(y.data(), rows.data(), weights.data(), 1, kCount, kHidden, out.data());
    return out;
  }

  std::vector<float> run(const Kernels& isa, const std::vector<const Expert*>& all, ReadThreads* reads,
                         const std::vector<PendingExpert>& pending, const std::function<bool()>& interrupted = never,
                         double* waited = nullptr) const {
    std::vector<float> out(kHidden);
    const double seconds = run_token(isa, all, x.data(), weights.data(), Activation{ActivationKind::gelu}, reads,
                                     pending, interrupted, out.data());
    if (waited) *waited = seconds;
    return out;
  }
};

/// Some experts come from a file while the others are resident, in the order in which they are asked for.
void check_pending(const Kernels& isa, const TokenCase& c, const TemporaryFile& file,
                   const std::vector<int64_t>& late) {
  const std::vector<float> expected = c.plain(isa, c.views());
  ReadThreads reads(1);
  std::vector<const Expert*> all = c.views();
  std::vector<ExpertMatrices> memory;
  memory.reserve(late.size());
  std::vector<PendingExpert> pending;
  double waited = 0;
  {
    const Held held(reads);  // all of them are pending when the call begins
    for (int64_t rank : late) {
      memory.push_back(c.experts[rank].blank());
      all[rank] = &memory.back().view;
      pending.push_back({rank, reads.submit(file.fd, c.offsets[rank], memory.back().spans(), 0, nullptr)});
    }
    const auto let_go = [&] {
      held.door->open();
      return false;
    };
    expect(c.run(isa, all, &reads, pending, let_go, &waited) == expected, isa.name, "experts that are pending");
    expect(waited >= 0.9 * kCheckInterval, isa.name, "how long a call has waited");
  }
  expect(c.run(isa, all, &reads, pending) == expected, isa.name, "experts whose reads have ended");
  expect(c.run(isa, all, nullptr, {}) == expected, isa.name, "experts that are resident at last");
}

/// A read that fails holds nothing up; whoever asked for it sees that it failed.
void check_failed_read(const Kernels& isa, const TokenCase& c) {
  ReadThreads reads(2);
  const int unreadable = open(kNull, O_WRONLY);
  const ExpertMatrices none = c.experts[1].blank(), part = c.experts[2].blank();
  std::vector<const Expert*> all = c.views();
  all[1] = &none.view, all[2] = &part.view;
  std::vector<uint8_t> cut = part.bytes();
  const int64_t left = int64_t(cut.size()) - 11;
  std::copy_n(c.content.begin() + c.offsets[2], left, cut.begin());
  cut.resize(left);
  const TemporaryFile cut_file(cut);
  const std::vector<PendingExpert> pending = {{1, reads.submit(unreadable, 0, none.spans(), 0, nullptr)},
                                              {2, reads.submit(cut_file.fd, 0, part.spans(), 0, nullptr)}};
  const std::vector<float> out = c.run(isa, all, &reads, pending);
  ::close(unreadable);
  expect(out == c.plain(isa, all), isa.name, "a token with experts that were not read");
  const std::vector<Outcome> outcomes = reads.finished();
  bool failed = false, ended_early = false;
  for (const Outcome& outcome : outcomes) {
    failed = failed || (outcome.ticket == pending[0].ticket && outcome.error == EBADF && outcome.done == 0);
    ended_early = ended_early || (outcome.ticket == pending[1].ticket && outcome.error == 0 && outcome.done == left);
  }
  expect(outcomes.size() == 2 && failed && ended_early, isa.name, "reads that failed are told");
}

/// A wait that is interrupted leaves the result as it was, and the read goes on.
void check_interrupted_token(const Kernels& isa, const TokenCase& c, const TemporaryFile& file) {
  ReadThreads reads(1);
  const Held held(reads);
  const ExpertMatrices memory = c.experts[3].blank();
  std::vector<const Expert*> all = c.views();
  all[3] = &memory.view;
  const std::vector<PendingExpert> pending = {{3, reads.submit(file.fd, c.offsets[3], memory.spans(), 0, nullptr)}};
  std::vector<float> out(c.kHidden, 7.0f);
  int asked = 0;
  bool interrupted = false;
  try {
    run_token(
        isa, all, c.x.data(), c.weights.data(), Activation{ActivationKind::gelu}, &reads, pending,
        [&] { return ++asked == 2; }, out.data());
  } catch (const Interrupted&) {
    interrupted = true;
  }
  expect(interrupted && asked == 2 && out == std::vector<float>(c.kHidden, 7.0f), isa.name, "an interrupted token");
  held.door->open();
  expect(c.run(isa, all, &reads, pending) == c.plain(isa, c.views()), isa.name, "a token after an interrupted one");
}

void check_refused_tokens(const Kernels& isa, const TokenCase& c) {
  ReadThreads reads(1);
  const uint64_t first = reads.submit(-1, 0, {}, 0, nullptr), second = reads.submit(-1, 0, {}, 0, nullptr);
  const auto refuses = [&](const std::vector<const Expert*>& all, ReadThreads* threads,
                           const std::vector<PendingExpert>& pending, const std::string& what) {
    expect_refused([&] { c.run(isa, all, threads, pending); }, isa.name, what);
  };
  refuses(c.views(), &reads, {{c.kCount, first}}, "a pending expert that there is not");
  refuses(c.views(), &reads, {{-1, first}}, "a pending expert below all");
  refuses(c.views(), &reads, {{0, first}, {0, second}}, "an expert that is pending twice");
  refuses(c.views(), &reads, {{0, first}, {1, first}}, "a read of two experts");
  refuses(c.views(), nullptr, {{0, first}}, "a pending expert that nobody reads");
  refuses({}, nullptr, {}, "a token without experts");
  const ExpertMatrices wider(c.kHidden, c.kWidth + 1, {2}, 4), longer(c.kHidden + 1, c.kWidth, {2}, 4);
  for (const ExpertMatrices* other : {&wider, &longer}) {
    std::vector<const Expert*> all = c.views();
    all[2] = &other->view;
    refuses(all, nullptr, {}, "experts of two shapes");
  }
}

void check_token(const Kernels& isa) {
  const TokenCase c;
  const TemporaryFile file(c.content);
  expect(c.run(isa, c.views(), nullptr, {}) == c.plain(isa, c.views()), isa.name, "experts that are resident");
  check_pending(isa, c, file, {3, 0, 1});
}

/// How a token waits, which does not depend on the instruction set.
void check_waits() {
  const TokenCase c;
  const TemporaryFile file(c.content);
  for (const std::vector<int64_t>& late : std::vector<std::vector<int64_t>>{{0}, {3, 2, 1, 0}})
    check_pending(kScalar, c, file, late);
  check_failed_read(kScalar, c);
  check_interrupted_token(kScalar, c, file);
  check_refused_tokens(kScalar, c);
}

}  // namespace
}  // namespace dymoe
