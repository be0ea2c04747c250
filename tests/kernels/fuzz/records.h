// What comes from outside, from bytes that a fuzzer chooses: layouts of records, segments, experts and what kernels
// make of them, tables of experts, and reads with checksums. Everything is refused by std::invalid_argument or works; a
// sanitizer sees what is read or written beyond its memory.
#pragma once

#include <numeric>

#include "../check.h"
#include "../reading.h"
#include "decode/resident_table.h"
#include "decode/token.h"
#include "isa/isa.h"
#include "ops/moe.h"
#include "ops/ops.h"
#include "record/checksum.h"
#include "record/plan.h"

namespace dymoe {
namespace {

/// Numbers from the bytes of an input; zeros once they are used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  uint8_t byte() {
    if (!left_) return 0;
    --left_;
    return *data_++;
  }

  /// Returns a number of 0..most, or now and then one that nobody expects.
  int64_t number(int64_t most) {
    static const int64_t odd[] = {-1, INT64_MIN, INT64_MAX, int64_t(1) << 31, int64_t(1) << 60, int64_t(1) << 62};
    const uint8_t first = byte();
    if (first >= 250) return odd[first - 250];
    return (int64_t(first) << 8 | byte()) % (most + 1);
  }

  size_t left() const { return left_; }

 private:
  const uint8_t* data_;
  size_t left_;
};

/// Runs a call, which may refuse its arguments.
template <class Call>
bool accepted(Call call) {
  try {
    call();
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

/// A layout like those of compiled bundles, some numbers of which the input may change.
MatrixLayout layout_from(Input& input, const std::string& name, int64_t rows, int64_t cols, int64_t& offset) {
  constexpr Grid grids[] = {Grid::mxfp4, Grid::trellis, Grid::usual, Grid::usual};
  MatrixLayout m{name, rows, cols, {2, 4}, {}, {}, {}, grids[input.byte() % 4]};
  const int64_t blocks = (cols + kBlock - 1) / kBlock;
  const auto part = [&](int64_t segment, int64_t nbytes) {
    const Part found{segment, offset, nbytes};
    offset += nbytes;
    return found;
  };
  for (int width : {2, 1, 1}) {
    const int64_t of_pairs = (rows + 1) / 2 * symbol_bytes(blocks), all = rows * blocks * 8 * width;
    m.planes.push_back({width, width == 2 ? 2 : 4, part(0, width == 1 && m.grid == Grid::trellis ? of_pairs : all)});
  }
  for (int rung = 0; rung < 2; ++rung) m.scale_indices.push_back(part(0, rows * scale_index_bytes(blocks, m.grid)));
  m.multiplier = part(0, 2 * rows);
  for (int changes = std::max(0, input.byte() % 6 - 3); changes > 0; --changes) {
    Part* const parts[] = {&m.planes[0].part, &m.planes[2].part, &m.scale_indices[0], &m.scale_indices[1],
                           &m.multiplier};
    Part& one = *parts[input.byte() % 5];
    switch (input.byte() % 10) {
      case 0:
        m.rows = input.number(70);
        break;
      case 1:
        m.cols = input.number(200);
        break;
      case 2:
        m.ladder[input.byte() % m.ladder.size()] = int(input.number(9));
        break;
      case 3:
        m.ladder.pop_back();
        m.ladder.push_back(int(input.number(9)));
        break;
      case 4:
        m.planes[input.byte() % m.planes.size()].width = int(input.number(9));
        break;
      case 5:
        m.planes[input.byte() % m.planes.size()].tier = int(input.number(9));
        break;
      case 6:
        one.segment = input.number(3);
        break;
      case 7:
        one.offset = input.number(9000);
        break;
      case 8:
        one.nbytes = input.number(9000);
        break;
      default:
        m.scale_indices.resize(input.byte() % 4);
        break;
    }
    if (m.scale_indices.size() < 2) break;
  }
  return m;
}

/// Runs what can be made of a record: its matrices and its expert, at a tier that it may not have.
void use_record(const Plan& plan, int tier, const std::vector<Segment>& segments, const Kernels& isa) {
  for (const char* name : {"gate", "down", "weight"})
    accepted([&] {
      const MatrixView view = plan.view(name, tier, segments);
      std::vector<float> x(view.cols, 0.5f), y(view.rows);
      linear(isa, view, x.data(), 1, y.data());
      std::vector<float> all(view.rows * view.cols);
      rows(isa, view, nullptr, view.rows, all.data());
    });
  accepted([&] {
    const Expert expert = find_expert(plan, tier, segments);
    const int64_t hidden = expert.gate.cols;
    std::vector<float> x(hidden, 0.5f), y(hidden);
    const float weight = 1.0f;
    run_token(isa, {&expert}, x.data(), &weight, {ActivationKind::silu}, nullptr, {}, never, y.data());
  });
}

void fuzz_record(Input& input, const Kernels& isa) {
  const int64_t hidden = 1 + input.byte() % 150, width = 1 + input.byte() % 80;
  int64_t nbytes = 0;
  const auto size_of = [&](int64_t usual) { return input.byte() % 16 ? usual : 1 + input.byte() % 150; };
  std::vector<MatrixLayout> matrices;
  for (const char* name : {"gate", "up"})
    matrices.push_back(layout_from(input, name, size_of(width), size_of(hidden), nbytes));
  matrices.push_back(layout_from(input, "down", size_of(hidden), size_of(width), nbytes));
  std::vector<VectorLayout> vectors;
  if (input.byte() % 2) {
    const int64_t length = size_of(width), begin = (nbytes + 63) / 64 * 64;
    vectors.push_back({"gate_bias", {0, begin, 4 * length}});
    nbytes = begin + 4 * length;
    if (input.byte() % 4 == 0) vectors[0].part = {input.number(2), input.number(9000), input.number(400)};
  }
  const int64_t size = input.byte() % 4 ? nbytes : std::max<int64_t>(0, nbytes - input.byte());
  const int tier = input.byte() % 4 ? (input.byte() % 2 ? 2 : 4) : int(input.number(9));
  const size_t count = input.byte() % 16 ? 1 : 0;
  const auto memory = buffer<uint8_t>(size);  // exactly as much as is said
  for (int64_t i = 0; i < size; ++i) memory[i] = uint8_t(i * 151 + input.byte());
  const std::vector<Segment> segments(count, Segment{memory.get(), size});
  accepted([&] { use_record(Plan(matrices, vectors), tier, segments, isa); });
}

void fuzz_table(Input& input) {
  accepted([&] {
    ResidentTable table(1 + input.byte() % 3, 1 + input.byte() % 5, {2, 4});
    const ExpertMatrices expert(64, 8, {2}, 4);
    for (int n = input.byte() % 40; n > 0; --n) {
      const int64_t layer = input.number(3), number = input.number(5);
      const int tier = int(input.number(5));
      accepted([&] { table.put(layer, number, tier, &expert.view); });
      accepted([&] { table.remove(layer, input.number(5), tier); });
      accepted([&] { table.set_rule(layer, std::vector<double>(input.byte() % 4, 0.5), {number}); });
      accepted([&] {
        int tiers[2];
        const int64_t experts[] = {number, 0};
        const float weights[] = {0.5f, 0.5f};
        if (layer < 0 || layer > 2 || number < 0 || number > 4) return;
        try {
          table.choose_tiers(layer, experts, weights, 2, tiers);
        } catch (const std::out_of_range&) {  // a layer or an expert that there is not
        }
      });
    }
  });
}

/// Reads of any offset into buffers of any size, with checksums of which some are wrong.
void fuzz_reads(Input& input) {
  static const std::vector<uint8_t> content = random_bytes(20'000);
  static const TemporaryFile file(content);
  ReadThreads reads(2);
  std::vector<std::unique_ptr<uint8_t[]>> buffers;
  for (int n = 1 + input.byte() % 6; n > 0; --n) {
    std::vector<Span> spans;
    std::vector<uint32_t> checksums;
    int64_t offset = input.number(25'000), at = offset;
    for (int count = input.byte() % 4; count > 0; --count) {
      const int64_t size = input.byte() % 3 ? input.byte() * 40 : 0;
      buffers.push_back(buffer<uint8_t>(size));
      spans.push_back({buffers.back().get(), size});
      const bool inside = at >= 0 && at <= int64_t(content.size()) - size;
      checksums.push_back(inside && input.byte() % 8 ? crc32_of(content.data() + at, size) : input.byte());
      at += inside ? size : 0;
    }
    if (input.byte() % 3 == 0) checksums.clear();
    const int urgency = input.byte() % kUrgencies;
    const uint64_t ticket = reads.submit(input.byte() % 9 ? file.fd : -1, offset, spans, urgency, nullptr, checksums);
    if (input.byte() % 3 == 0) reads.reprioritize(ticket + input.byte() % 2, urgency, input.byte() % kUrgencies);
    if (input.byte() % 4 == 0) reads.cancel(ticket + input.byte() % 2, urgency);
    if (input.byte() % 4 == 0) wait_for_any(reads, {ticket}, never);
  }
  close(reads, kPatience, never);
}

void fuzz_checksum(Input& input) {
  const int64_t size = int64_t(input.left());
  const auto bytes = buffer<uint8_t>(size);
  for (int64_t i = 0; i < size; ++i) bytes[i] = input.byte();
  if (crc32_of(bytes.get(), size) != crc32_of(*available_checksums().back(), bytes.get(), size)) std::abort();
}

/// Runs one input; its first byte says what it is for.
void fuzz(const uint8_t* data, size_t size) {
  Input input(data, size);
  switch (input.byte() % 8) {
    case 0:
      return fuzz_table(input);
    case 1:
      return fuzz_reads(input);
    case 2:
      return fuzz_checksum(input);
    default:
      return fuzz_record(input, *available_isas()[0]);
  }
}

}  // namespace
}  // namespace dymoe
