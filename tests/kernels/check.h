// What the checks of kernel_check.cpp share: expectations, random data in buffers of exactly its size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "record/expert.h"
#include "threads/read_threads.h"

namespace dymoe {
namespace {

std::mt19937 random_bits(1);
int failures = 0;

/// Prints what is not as it should be, and of whom.
void expect(bool ok, const char* whose, const std::string& what) {
  if (ok) return;
  if (failures++ < 20) std::printf("%s: %s: wrong\n", whose, what.c_str());
}

/// Expects std::invalid_argument.
template <class Call>
void expect_refused(Call call, const char* whose, const std::string& what) {
  bool refused = false;
  try {
    call();
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused, whose, what);
}

template <class T>
std::unique_ptr<T[]> buffer(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

std::vector<float> random_floats(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random_bits);
  return values;
}

void fill_at_random(uint8_t* data, int64_t nbytes) {
  for (int64_t i = 0; i < nbytes; i += 4) {
    const uint32_t word = uint32_t(random_bits());
    std::memcpy(data + i, &word, size_t(std::min<int64_t>(4, nbytes - i)));
  }
}

std::vector<uint8_t> random_bytes(int64_t count) {
  std::vector<uint8_t> bytes(count);
  fill_at_random(bytes.data(), count);
  return bytes;
}

/// Whether they are equal but for the order of float sums.
bool is_close(const std::vector<float>& a, const std::vector<float>& b, float share = 1e-5f) {
  if (a.size() != b.size()) return false;
  float most = 0.0f, off = 0.0f;
  for (size_t i = 0; i < a.size(); ++i) {
    most = std::max(most, std::fabs(b[i]));
    const float apart = std::fabs(a[i] - b[i]);
    if (std::isnan(apart)) return false;
    off = std::max(off, apart);
  }
  return off <= share * most;
}

constexpr uint16_t kOne = 0x3f80;  // bf16

/// A random matrix; every part has its own buffer, so that a sanitizer sees what is read beyond it.
struct Matrix {
  std::vector<std::unique_ptr<uint8_t[]>> parts;  // planes, scale indices, multipliers
  std::vector<int64_t> sizes;
  MatrixView view{};

  /// Planes of these widths, of a ladder up to `top` bits; each row has the multiplier, bf16.
  Matrix(int64_t rows, int64_t cols, const std::vector<int>& widths, int top, uint16_t multiplier = kOne,
         Grid grid = Grid::usual) {
    view.rows = rows, view.cols = cols, view.blocks = (cols + kBlock - 1) / kBlock, view.grid = grid;
    for (int width : widths) {
      const bool paired = grid == Grid::trellis && width == 1;
      add_part(paired ? (rows + 1) / 2 * symbol_bytes(view.blocks) : rows * view.blocks * 8 * width);
      view.plane[view.planes++].width = width;
      view.bits += width;
    }
    add_part(rows * scale_index_bytes(view.blocks, grid));
    add_part(2 * rows);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(parts.back().get() + 2 * r, &multiplier, sizeof multiplier);
    view.levels = levels_of(view.bits, top, grid);
    find_parts();
  }

  /// A matrix of the same shape whose parts are zeros.
  Matrix blank() const {
    Matrix copy;
    copy.view = view;
    for (int64_t size : sizes) {
      copy.parts.push_back(buffer<uint8_t>(size));
      copy.sizes.push_back(size);
      std::memset(copy.parts.back().get(), 0, size);
    }
    copy.find_parts();
    return copy;
  }

 private:
  Matrix() = default;

  void add_part(int64_t nbytes) {
    parts.push_back(buffer<uint8_t>(nbytes));
    sizes.push_back(nbytes);
    fill_at_random(parts.back().get(), nbytes);
  }

  void find_parts() {
    for (int i = 0; i < view.planes; ++i) view.plane[i].data = parts[i].get();
    view.scale_indices = parts[view.planes].get(), view.multiplier = parts[view.planes + 1].get();
  }
};

constexpr uint16_t kExpertMultiplier = 0x3a80;  // 2^-10: outputs about as large as inputs

/// A random expert, the memory of which reads may fill.
struct ExpertMatrices {
  Matrix gate, up, down;
  Expert view;

  ExpertMatrices(int64_t hidden, int64_t width, const std::vector<int>& widths, int top)
      : ExpertMatrices(Matrix(width, hidden, widths, top, kExpertMultiplier),
                       Matrix(width, hidden, widths, top, kExpertMultiplier),
                       Matrix(hidden, width, widths, top, kExpertMultiplier)) {}

  /// An expert of the same shape whose bytes are zeros.
  ExpertMatrices blank() const { return {gate.blank(), up.blank(), down.blank()}; }

  /// Where its bytes are, in the order in which `bytes` has them.
  std::vector<Span> spans() const {
    std::vector<Span> spans;
    for (const Matrix* m : {&gate, &up, &down})
      for (size_t i = 0; i < m->parts.size(); ++i) spans.push_back({m->parts[i].get(), m->sizes[i]});
    return spans;
  }

  std::vector<uint8_t> bytes() const {
    std::vector<uint8_t> all;
    for (const Span& span : spans()) all.insert(all.end(), span.data, span.data + span.nbytes);
    return all;
  }

 private:
  ExpertMatrices(Matrix g, Matrix u, Matrix d)
      : gate(std::move(g)), up(std::move(u)), down(std::move(d)), view{gate.view, up.view, down.view} {}
};

}  // namespace
}  // namespace dymoe
